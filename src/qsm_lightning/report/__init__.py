"""What runs came to: read (``results``), summed up (``statistics``), drawn (``pictures``), written down (``page``)."""
