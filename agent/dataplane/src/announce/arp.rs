//! ARP for IPv4 over Ethernet (RFC 826) as bytes.

mod socket;

pub(super) use self::socket::ArpSocket;

use std::net::Ipv4Addr;

use weft_cni_netlink::Mac;

/// Bytes of a frame: Ethernet's header and the packet.
pub(super) const FRAME_BYTES: usize = 42;
const ETHERTYPE: [u8; 2] = [0x08, 0x06];
/// Ethernet, IPv4, and the lengths of their addresses.
const FORMAT: [u8; 6] = [0, 1, 0x08, 0x00, 6, 4];
pub(super) const BROADCAST: Mac = Mac([0xff; 6]);

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Request,
    Reply,
}

/// A packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) operation: Operation,
    pub(super) sender_mac: Mac,
    pub(super) sender: Ipv4Addr,
    pub(super) target_mac: Mac,
    pub(super) target: Ipv4Addr,
}

impl Frame {
    /// "Who has `target`?"
    pub(super) fn request(own: Mac, sender: Ipv4Addr, target: Ipv4Addr) -> Self {
        Self { operation: Operation::Request, sender_mac: own, sender, target_mac: Mac([0; 6]), target }
    }

    /// "`address` is here" (RFC 5227 §3: an announcement is a request for the sender's own address).
    pub(super) fn announcement(own: Mac, address: Ipv4Addr) -> Self {
        Self::request(own, address, address)
    }

    /// Whether it says who has an address: a reply, or a request from the address itself (RFC 5227's announcement).
    pub(super) fn tells(&self) -> bool {
        match self.operation {
            Operation::Reply => true,
            Operation::Request => self.sender == self.target,
        }
    }

    /// As sent to `to`.
    pub(super) fn encode(&self, to: Mac) -> [u8; FRAME_BYTES] {
        let operation = match self.operation {
            Operation::Request => [0, 1],
            Operation::Reply => [0, 2],
        };
        let parts: [&[u8]; 9] = [
            &to.0,
            &self.sender_mac.0,
            &ETHERTYPE,
            &FORMAT,
            &operation,
            &self.sender_mac.0,
            &self.sender.octets(),
            &self.target_mac.0,
            &self.target.octets(),
        ];
        let mut frame = [0; FRAME_BYTES];
        for (to, from) in frame.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        frame
    }

    /// `None` for what is no ARP for IPv4 over Ethernet. Padding behind the packet is ignored.
    pub(super) fn decode(frame: &[u8]) -> Option<Self> {
        let frame: &[u8; FRAME_BYTES] = frame.first_chunk()?;
        let mac = |at: usize| Some(Mac(frame.get(at..at + 6)?.try_into().ok()?));
        let ip = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(frame.get(at..at + 4)?).ok()?));
        if frame[12..14] != ETHERTYPE || frame[14..20] != FORMAT {
            return None;
        }
        let operation = match frame[20..22] {
            [0, 1] => Operation::Request,
            [0, 2] => Operation::Reply,
            _ => return None,
        };
        Some(Self { operation, sender_mac: mac(22)?, sender: ip(28)?, target_mac: mac(32)?, target: ip(38)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_went_and_no_other_bytes_are_one() {
        let own = Mac([2, 0, 0, 0, 0, 1]);
        let frame = Frame::request(own, Ipv4Addr::new(10, 44, 0, 2), Ipv4Addr::new(10, 44, 0, 200));
        let mut bytes = frame.encode(BROADCAST).to_vec();
        // RFC 826's layout, written out.
        let expected = [
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0,
            0, 1, 10, 44, 0, 2, 0, 0, 0, 0, 0, 0, 10, 44, 0, 200,
        ];
        assert_eq!(bytes, expected);
        bytes.resize(60, 0);
        assert_eq!(Frame::decode(&bytes), Some(frame), "padded to Ethernet's least");
        for cut in 0..FRAME_BYTES {
            assert_eq!(Frame::decode(&bytes[..cut]), None);
        }
        bytes[21] = 3;
        assert_eq!(Frame::decode(&bytes), None, "an operation that is no ARP's");
    }
}
