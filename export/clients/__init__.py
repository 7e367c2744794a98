"""Programs that others wrote, each as a session of the engine, so that what they say is compared as ours is."""
