"""Real guests on the compiled card: user-mode Linux over vhost-user, QEMU over vfio-user."""
