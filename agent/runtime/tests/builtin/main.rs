//! The built-in runtime against the kernel: real namespaces, cgroups, mounts and processes.

mod containers;
mod image;
mod images;
mod networks;
mod node;
mod restarts;
mod security;
