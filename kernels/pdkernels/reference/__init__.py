"""What each kernel must compute, in plain torch: slow, short, and the definition the tests compare with."""
