"""What every room uses: pages, row requests, widths, RoPE, errors. Light to import; names come from its files."""
