"""`scaled_dot_product_attention` in place of torch's: the call, its arguments and shapes, and putting it into torch."""
