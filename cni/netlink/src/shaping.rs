//! Bounds on what a device sends: the token bucket.

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_REPLACE, Nla as _, NlasIterator};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};

use crate::socket::About;
use crate::{Error, Netlink};

const KIND: &str = "tbf";
/// Our own number for the queue, so that it can be told from somebody else's.
const HANDLE: TcHandle = TcHandle { major: 0x77ef, minor: 0 };

/// `TCA_TBF_PARMS`, `TCA_TBF_RATE64`, `TCA_TBF_BURST`.
const PARAMETERS: u16 = 1;
const RATE: u16 = 4;
const BURST: u16 = 6;
/// `TC_LINKLAYER_ETHERNET`: the kernel computes by itself, and wants no table.
const ETHERNET: u8 = 1;

/// A bound on what a device sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Bytes in a second.
    pub bytes_per_second: u64,
    /// Bytes that may go at once after silence: not less than a packet has, or none would ever go.
    pub burst_bytes: u32,
    /// Bytes that wait; what comes beyond them is dropped.
    pub queue_bytes: u32,
}

impl Netlink {
    /// Bounds what a device sends, in place of an earlier bound.
    ///
    /// # Errors
    /// [`crate::Class::NotFound`] if the kernel has no token bucket, or there is no such device.
    pub fn shape(&mut self, index: u32, shape: &Shape) -> Result<(), Error> {
        let mut message = root(index);
        message.header.handle = HANDLE;
        message.attributes = vec![
            TcAttribute::Kind(KIND.to_owned()),
            TcAttribute::Options(vec![
                TcOption::Other(DefaultNla::new(PARAMETERS, parameters(shape))),
                TcOption::Other(DefaultNla::new(RATE, shape.bytes_per_second.to_ne_bytes().to_vec())),
                TcOption::Other(DefaultNla::new(BURST, shape.burst_bytes.to_ne_bytes().to_vec())),
            ]),
        ];
        let subject = index.to_string();
        let about = About { op: "bound the rate of", subject: &subject };
        self.request(about, RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// How many bytes in a second a device may send, if we have bounded it.
    ///
    /// # Errors
    /// If the kernel can't be asked.
    pub fn shaped(&mut self, index: u32) -> Result<Option<u64>, Error> {
        let request = RouteNetlinkMessage::GetQueueDiscipline(root(index));
        let found = self.dump("list the queues", &request, |message| match message {
            RouteNetlinkMessage::NewQueueDiscipline(message) => read(&message, index),
            _ => None,
        })?;
        Ok(found.first().copied())
    }
}

fn root(index: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = index.cast_signed();
    message.header.parent = TcHandle::ROOT;
    message
}

/// `struct tc_tbf_qopt`: two `struct tc_ratespec` of 12 bytes (the second, of the peak, unused), queue, buffer, packet.
fn parameters(shape: &Shape) -> Vec<u8> {
    let mut bytes = vec![0; 36];
    bytes[1] = ETHERNET;
    let rate = u32::try_from(shape.bytes_per_second).unwrap_or(u32::MAX);
    bytes[8..12].copy_from_slice(&rate.to_ne_bytes());
    bytes[24..28].copy_from_slice(&shape.queue_bytes.to_ne_bytes());
    bytes
}

fn read(message: &TcMessage, index: u32) -> Option<u64> {
    let ours = message.header.index == index.cast_signed() && message.header.handle == HANDLE;
    let options = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) if ours => Some(options),
        _ => None,
    })?;
    let (mut rate, mut wide) = (None, None);
    for option in options {
        // The library leaves what is in an option of a kind that it doesn't know as bytes.
        let TcOption::Other(option) = option else { continue };
        let mut bytes = vec![0; option.value_len()];
        option.emit_value(&mut bytes);
        for attribute in NlasIterator::new(&bytes[..]).filter_map(Result::ok) {
            let value = attribute.value();
            match attribute.kind() {
                PARAMETERS => rate = value.get(8..12)?.try_into().ok().map(u32::from_ne_bytes).map(u64::from),
                RATE => wide = value.try_into().ok().map(u64::from_ne_bytes),
                _ => {}
            }
        }
    }
    wide.or(rate)
}
