"""What people read: text made safe for terminals and logs, masked passwords, commands as they work here."""
