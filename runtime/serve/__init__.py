"""An HTTP server for one artifact, which clients of the OpenAI API can call. Needs the extra `serve`."""
