"""What runs inside the virtual machines: a payload that takes orders, and the Python that gives them."""
