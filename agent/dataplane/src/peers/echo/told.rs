//! What routers say of questions that are too large.

use std::io;
use std::net::IpAddr;

use tokio::net::UdpSocket;

use super::HEADER_BYTES;
use crate::icmp::{Returned, try_returned};

/// The errors that one socket may have queued are taken in turns of as many.
const AT_ONCE: usize = 1_024;

/// A packet was too large for the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    /// Where it was to go.
    pub(crate) to: IpAddr,
    /// The number of the question.
    pub(crate) number: u16,
    /// What the next link takes, as a router says.
    pub(crate) takes_bytes: u32,
}

/// The next of a socket that is about a question of this kind and id, and says a size. All others are passed over.
pub(super) fn next(socket: &UdpSocket, kind: u8, id: u16) -> io::Result<Option<Told>> {
    for _ in 0..AT_ONCE {
        let mut head = [0; HEADER_BYTES];
        match try_returned(socket, &mut head) {
            Ok(returned) => {
                if let Some(told) = read(&head, &returned, kind, id) {
                    return Ok(Some(told));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn read(head: &[u8; HEADER_BYTES], returned: &Returned, kind: u8, id: u16) -> Option<Told> {
    let whole = returned.about_bytes == HEADER_BYTES;
    let ours = whole && head[0] == kind && head[4..6] == id.to_be_bytes();
    (ours && returned.errno == libc::EMSGSIZE).then_some(Told {
        to: returned.to?,
        number: u16::from_be_bytes([head[6], head[7]]),
        takes_bytes: returned.info,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_size_that_is_said_of_a_question_counts() {
        let head = [8, 0, 1, 2, 0xbe, 0xef, 0, 7];
        let to = IpAddr::from([10, 0, 0, 1]);
        let large = Returned { about_bytes: 8, to: Some(to), errno: libc::EMSGSIZE, info: 1_400 };
        assert_eq!(read(&head, &large, 8, 0xbeef), Some(Told { to, number: 7, takes_bytes: 1_400 }));
        assert_eq!(read(&head, &large, 8, 0xbeee), None, "somebody else's");
        assert_eq!(read(&head, &large, 128, 0xbeef), None, "of another kind");
        let other = Returned { errno: libc::EHOSTUNREACH, ..large };
        assert_eq!(read(&head, &other, 8, 0xbeef), None, "another error");
        let cut = Returned { about_bytes: 7, ..large };
        assert_eq!(read(&head, &cut, 8, 0xbeef), None, "cut short");
    }
}
