//! The built-in runtime against the kernel: real namespaces, cgroups, mounts and processes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in what tests share")]

mod containers;
mod image;
mod images;
mod networks;
mod node;
mod restarts;
mod security;
