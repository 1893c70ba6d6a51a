"""Which tokens each head of a pretrained model selects, with what margin, and how that compares with max-margin."""
