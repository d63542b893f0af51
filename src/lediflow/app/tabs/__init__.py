"""How each tab of the page looks, and which function answers which button."""
