"""One file per law that scores must obey, over the methods that it binds."""
