"""LayerNorm and RMSNorm fused with the residual additions around them."""
