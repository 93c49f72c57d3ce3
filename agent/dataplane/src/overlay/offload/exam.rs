//! One peer is asked whether checksums are right that were left to the card.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recvmsg,
    sendto, socket,
};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::PORT;
use crate::peers::echo::checksum;
use crate::sys;

/// How long a datagram waits for its answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// Turns in which only the finished datagram is answered that make a card broken. A kernel says of one datagram a second that nobody
/// listens, and of six at once; a turn takes a second and gets one answer.
const ENOUGH: u8 = 5;
/// Turns after which it stays unknown.
const MOST: u8 = 8;
/// First bytes of a datagram, with its version; its number and which of the two it is follow.
const MAGIC: [u8; 8] = *b"weftcs01";
const BODY_BYTES: usize = 12;
const UDP: u8 = 17;
const UDP_HEADER_BYTES: u16 = 8;
const HOPS: u8 = 64;

/// What a peer's answers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A checksum that was left to the card arrives right.
    Sound,
    /// Those that are finished by the node arrive, others don't.
    Broken,
    /// Nobody answers.
    Unknown,
}

/// Asks until it is clear.
pub async fn examine(from: IpAddr, to: IpAddr) -> Verdict {
    match Exam::open(from, to).await {
        Ok(mut exam) => exam.run().await,
        Err(error) => {
            tracing::debug!(%from, %to, %error, "cannot ask about checksums");
            Verdict::Unknown
        }
    }
}

/// Whose checksum a datagram has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checksum {
    Left,
    Finished,
}

struct Exam {
    /// Sends what is left to the device, and gets the answers to both.
    plain: UdpSocket,
    /// Sends packets as they are.
    whole: OwnedFd,
    from: SocketAddr,
    to: SocketAddr,
    number: u16,
}

impl Exam {
    async fn open(from: IpAddr, to: IpAddr) -> io::Result<Self> {
        let plain = UdpSocket::bind((from, 0)).await?;
        sys::queue_errors(plain.as_fd(), from.is_ipv6())?;
        let family = if from.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        // Of this protocol nothing is ever received.
        let whole = socket(family, SockType::Raw, flags, SockProtocol::Raw)?;
        let from = plain.local_addr()?;
        Ok(Self { plain, whole, from, to: SocketAddr::new(to, PORT), number: 0 })
    }

    async fn run(&mut self) -> Verdict {
        let mut against = 0;
        for turn in 0..MOST {
            if self.is_answered(Checksum::Left).await {
                return Verdict::Sound;
            }
            let lives = self.is_answered(Checksum::Finished).await;
            against += u8::from(lives);
            if against == ENOUGH {
                return Verdict::Broken;
            }
            // A peer that answers nothing from the beginning is not waited for.
            if turn == 0 && !lives {
                break;
            }
        }
        Verdict::Unknown
    }

    async fn is_answered(&mut self, checksum: Checksum) -> bool {
        self.number = self.number.wrapping_add(1);
        let body = body(self.number, checksum);
        let address = SockaddrStorage::from(self.to);
        let sent = match checksum {
            Checksum::Left => {
                sendto(self.plain.as_raw_fd(), &body, &address, MsgFlags::MSG_DONTWAIT).map(drop)
            }
            Checksum::Finished => {
                // The kernel wants no port here.
                let address = SockaddrStorage::from(SocketAddr::new(self.to.ip(), 0));
                let packet = packet(self.from, self.to, &body);
                sendto(self.whole.as_raw_fd(), &packet, &address, MsgFlags::MSG_DONTWAIT).map(drop)
            }
        };
        if let Err(error) = sent {
            tracing::debug!(to = %self.to, ?checksum, %error, "cannot ask about checksums");
            return false;
        }
        tokio::time::timeout(PATIENCE, self.answer(&body)).await.is_ok()
    }

    /// Waits for the peer's word that nobody listens for a datagram.
    async fn answer(&self, about: &[u8]) {
        loop {
            if self.plain.ready(Interest::ERROR).await.is_err() {
                return std::future::pending().await;
            }
            while let Ok(refused) = self.plain.try_io(Interest::ERROR, || refused(&self.plain)) {
                if refused.as_deref() == Some(about) {
                    return;
                }
            }
        }
    }
}

/// The body of the next datagram that an error is queued about; `None` if it says something else than that nobody listens.
fn refused(socket: &UdpSocket) -> io::Result<Option<Vec<u8>>> {
    let mut body = vec![0; BODY_BYTES];
    let mut control =
        nix::cmsg_space!([u8; size_of::<libc::sock_extended_err>() + size_of::<libc::sockaddr_in6>()]);
    let mut into = [IoSliceMut::new(&mut body)];
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut into, Some(&mut control), flags)?;
    let refused = message.cmsgs()?.any(|message| {
        use ControlMessageOwned as M;
        let (M::Ipv4RecvErr(error, _) | M::Ipv6RecvErr(error, _)) = message else { return false };
        i32::try_from(error.ee_errno) == Ok(libc::ECONNREFUSED)
    });
    let whole = message.bytes == BODY_BYTES;
    Ok((refused && whole).then_some(body))
}

fn body(number: u16, checksum: Checksum) -> [u8; BODY_BYTES] {
    let mut body = [0; BODY_BYTES];
    body[..8].copy_from_slice(&MAGIC);
    body[8..10].copy_from_slice(&number.to_be_bytes());
    body[10] = u8::from(checksum == Checksum::Finished);
    body
}

/// A whole packet with a datagram whose checksum is right.
fn packet(from: SocketAddr, to: SocketAddr, body: &[u8; BODY_BYTES]) -> Vec<u8> {
    let length = UDP_HEADER_BYTES + u16::try_from(BODY_BYTES).unwrap_or(0);
    let addresses: Vec<u8> = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (from, to) => [from, to].iter().flat_map(|ip| v6(*ip)).collect(),
    };
    let mut datagram: Vec<u8> =
        [from.port(), to.port(), length, 0].iter().flat_map(|field| field.to_be_bytes()).collect();
    datagram.extend(body);
    // RFC 768 and RFC 8200 §8.1: over a header that stands for that of IP.
    let mut summed = addresses.clone();
    summed.extend([0, UDP]);
    summed.extend(length.to_be_bytes());
    summed.extend(&datagram);
    let sum = match checksum(&summed) {
        0 => u16::MAX,
        sum => sum,
    };
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    let mut packet = match from {
        // The kernel fills in IPv4's length, identification and checksum.
        SocketAddr::V4(_) => vec![0x45, 0, 0, 0, 0, 0, 0, 0, HOPS, UDP, 0, 0],
        SocketAddr::V6(_) => {
            let [high, low] = length.to_be_bytes();
            vec![0x60, 0, 0, 0, high, low, UDP, HOPS]
        }
    };
    packet.extend(addresses);
    packet.extend(datagram);
    packet
}

fn v6(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finished_datagram_is_whole() {
        for (from, to, header) in
            [("192.0.2.1:9", "192.0.2.2:8475", 20), ("[fd00::1]:9", "[fd00::2]:8475", 40)]
        {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            let body = body(7, Checksum::Finished);
            let packet = packet(from, to, &body);
            assert_eq!(packet.len(), header + 20);
            let (head, datagram) = packet.split_at(header);
            assert_eq!(&datagram[8..], body);
            let mut summed = head[if header == 20 { 12 } else { 8 }..].to_vec();
            summed.extend([0, UDP, 0, 20]);
            summed.extend(datagram);
            assert_eq!(checksum(&summed), 0, "with its checksum in it, it sums to nothing");
        }
    }
}
