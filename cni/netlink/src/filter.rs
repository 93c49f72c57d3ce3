//! eBPF programs as filters of a device: how packets are hooked where the kernel has no links for it (Linux before 6.6).

use std::os::fd::{AsRawFd as _, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};

use crate::socket::About;
use crate::{Class, Error, Netlink};

/// The queue discipline that does not queue, and has filters both ways.
const CLSACT: &str = "clsact";
/// `ETH_P_ALL` of linux/if_ether.h.
const ALL_PROTOCOLS: u16 = 0x0003;
/// There is one filter of ours at each turn.
const HANDLE: TcHandle = TcHandle { major: 0, minor: 1 };

/// Which packets of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Those that it receives.
    In,
    /// Those that it sends.
    Out,
}

/// A place for a program among a device's filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilterPlace {
    /// Index of the device.
    pub index: u32,
    /// Of which packets.
    pub direction: Direction,
    /// Those with lower ones are asked first; not 0.
    pub turn: u16,
}

impl FilterPlace {
    fn message(self) -> TcMessage {
        let mut message = TcMessage::default();
        message.header.index = self.index.cast_signed();
        message.header.parent = parent(self.direction);
        message.header.handle = HANDLE;
        message.header.info = (u32::from(self.turn) << 16) | u32::from(ALL_PROTOCOLS.to_be());
        message
    }
}

fn parent(direction: Direction) -> TcHandle {
    let minor = match direction {
        Direction::In => TcHandle::MIN_INGRESS,
        Direction::Out => TcHandle::MIN_EGRESS,
    };
    TcHandle { major: TcHandle::CLSACT.major, minor }
}

fn discipline(index: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = index.cast_signed();
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
    message.attributes = vec![TcAttribute::Kind(CLSACT.to_owned())];
    message
}

impl Netlink {
    /// Puts a program, with a name to show, at a place; in that of an earlier one between two packets.
    ///
    /// # Errors
    /// If there is no such device, or somebody else's filter of another kind has the turn.
    pub fn set_filter(
        &mut self,
        place: FilterPlace,
        program: BorrowedFd<'_>,
        name: &str,
    ) -> Result<(), Error> {
        let subject = place.index.to_string();
        let about = About { op: "make room for filters at", subject: &subject };
        let make = RouteNetlinkMessage::NewQueueDiscipline(discipline(place.index));
        match self.request(about, make, NLM_F_CREATE | NLM_F_EXCL) {
            Err(error) if error.class() == Class::Exists => {}
            other => other?,
        }
        let mut message = place.message();
        message.attributes = vec![
            TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
            TcAttribute::Options(vec![
                TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd().cast_unsigned())),
                TcOption::Bpf(TcFilterBpfOption::ProgName(name.to_owned())),
                TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
            ]),
        ];
        let about = About { op: "attach a filter to", subject: &subject };
        self.request(about, RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Id of the program at a place.
    ///
    /// # Errors
    /// If the kernel can't be asked.
    pub fn filter(&mut self, place: FilterPlace) -> Result<Option<u32>, Error> {
        let wanted = place.message().header;
        let found = self.filters(place.index, place.direction, |message| {
            let header = &message.header;
            let ours = header.handle == wanted.handle && header.info == wanted.info;
            let options = message.attributes.iter().find_map(|attribute| match attribute {
                TcAttribute::Options(options) if ours => Some(options),
                _ => None,
            })?;
            options.iter().find_map(|option| match option {
                TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
                _ => None,
            })
        })?;
        Ok(found.first().copied())
    }

    /// Takes away what is at a place, and the room for filters if that was the last. Nothing there is no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove_filter(&mut self, place: FilterPlace) -> Result<(), Error> {
        let subject = place.index.to_string();
        let about = About { op: "take a filter off", subject: &subject };
        self.unless_gone(about, RouteNetlinkMessage::DelTrafficFilter(place.message()))?;
        for direction in [Direction::In, Direction::Out] {
            if !self.filters(place.index, direction, |message| Some(message.header.handle))?.is_empty() {
                return Ok(());
            }
        }
        let about = About { op: "take the room for filters off", subject: &subject };
        self.unless_gone(about, RouteNetlinkMessage::DelQueueDiscipline(discipline(place.index)))
    }

    fn unless_gone(&mut self, about: About<'_>, message: RouteNetlinkMessage) -> Result<(), Error> {
        match self.request(about, message, 0) {
            // The device has gone (ENODEV), has no such filter (ENOENT), or no room for filters (EINVAL).
            Err(Error::Refused { errno, .. }) if is_gone(errno) => Ok(()),
            other => other,
        }
    }

    fn filters<T>(
        &mut self,
        index: u32,
        direction: Direction,
        mut read: impl FnMut(&TcMessage) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        let mut message = TcMessage::default();
        message.header.index = index.cast_signed();
        message.header.parent = parent(direction);
        let request = RouteNetlinkMessage::GetTrafficFilter(message);
        let found = self.dump("list the filters", &request, |message| match message {
            // Each turn is listed too, with no handle.
            RouteNetlinkMessage::NewTrafficFilter(message) if message.header.handle != TcHandle::UNSPEC => {
                read(&message)
            }
            _ => None,
        });
        match found {
            Err(Error::Refused { errno, .. }) if is_gone(errno) => Ok(Vec::new()),
            other => other,
        }
    }
}

const fn is_gone(errno: nix::errno::Errno) -> bool {
    use nix::errno::Errno;
    matches!(errno, Errno::ENODEV | Errno::ENOENT | Errno::EINVAL)
}
