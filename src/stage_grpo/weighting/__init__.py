"""Token weightings: how much each image token's advantage and KL count. One contract, one file a weighting."""
