"""The goals of each application, one file each: `goals(data)` yields what is asked and reached."""
