"""Graph passes: free functions ``(gm, context) -> gm``, each readable alone."""
