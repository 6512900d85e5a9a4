"""From any file to documents: text, images and audio in the order in which a reader meets them."""
