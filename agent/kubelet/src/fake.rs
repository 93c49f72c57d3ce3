//! An in-memory runtime and API server, for this crate's tests only.
