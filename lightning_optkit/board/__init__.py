"""What people look at: tags, array payloads, and the pages that show them."""
