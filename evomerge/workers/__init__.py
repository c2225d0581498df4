"""Workers: processes that own a device group and one live model, and the pools that feed them."""
