"""One file for each dialect: the bodies of an API, how they are read, and how answers are written. Each ends
with its `DIALECT`; chatlm/front/api/spoken.py has their rows. None knows HTTP: sandboxes read with them."""
