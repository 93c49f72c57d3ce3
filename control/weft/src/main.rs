//! `weft`: the command line for administrators, and the wiring of every role.
mod artifacts;
mod lock;
mod paths;
mod pki;
fn main() {}
