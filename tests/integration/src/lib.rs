//! Owns nothing yet.
#![forbid(unsafe_code)]
