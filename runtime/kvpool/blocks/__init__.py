"""What a block is: its layout, its identity and key, and the record that carries it through every tier."""
