//! Descriptors that the async runtime polls.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Registers a non-blocking descriptor.
#[expect(
    deprecated,
    reason = "the new constructor is unsafe; an OwnedFd keeps what it asks for: one descriptor, open while it lives"
)]
pub(crate) fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}
