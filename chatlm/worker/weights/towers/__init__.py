"""What sees pictures: the families of towers, and where a folder and an mmproj file have them."""
