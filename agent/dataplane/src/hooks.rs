//! Where programs are attached, and the pins by which the next agent finds them there.
//!
//! A pin holds a link, which a new program is put into between two packets. Where packets of a device are hooked by a filter instead, it
//! stays with its device, and the pin holds the program itself. That is so on Linux before 6.6, which has no links for packets, and at
//! devices that come and go with pods: making a link holds the kernel's lock on devices until all processors have been through a
//! scheduling point, 5 to 20 ms, and so does its end.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use weft_cni_netlink::{Direction, FilterPlace, Netlink};

use crate::node::{NodeError, failed};
use crate::sys;

/// `BPF_TCX_INGRESS`, `BPF_TCX_EGRESS`, `BPF_XDP` of linux/bpf.h.
const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;
const XDP: u32 = 37;
/// Between the name of a place and what its filter's is, in the name of a pin that holds a program.
const FILTER: &str = "-filter";
const IN: &str = "in";
const OUT: &str = "out";
/// The first of our turns among a device's filters: nobody else's are expected here.
const FIRST_TURN: u16 = 7;

/// A place where a program is called.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place<'a> {
    /// A cgroup, by attach type.
    Cgroup(BorrowedFd<'a>, u32),
    /// Packets of a device.
    Packets(Packets),
    /// Frames of a device, by its driver; with `XDP_FLAGS_…` of `linux/if_link.h`.
    Frames {
        /// Index of the device.
        index: u32,
        /// How it is attached.
        flags: u32,
    },
}

/// Packets of a device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packets {
    /// Index of the device.
    pub(crate) index: u32,
    /// Which of them.
    pub(crate) direction: Direction,
    /// Of two programs that are attached one after the other, which this is.
    pub(crate) turn: u16,
}

impl Packets {
    fn filter(self) -> FilterPlace {
        FilterPlace { index: self.index, direction: self.direction, turn: FIRST_TURN + self.turn }
    }

    /// How the pin of its filter is called, for a place of this name.
    fn pin(self, name: &str) -> String {
        let direction = match self.direction {
            Direction::In => IN,
            Direction::Out => OUT,
        };
        format!("{name}{FILTER}_{}_{direction}_{}", self.index, self.turn)
    }

    /// The name of a place, and what its filter's is, from that of the pin.
    fn read(pin: &str) -> Option<(&str, Self)> {
        let (name, packets) = pin.split_once(FILTER)?;
        let mut parts = packets.split('_').skip(1);
        let index = parts.next()?.parse().ok()?;
        let direction = match parts.next()? {
            IN => Direction::In,
            OUT => Direction::Out,
            _ => return None,
        };
        Some((name, Self { index, direction, turn: parts.next()?.parse().ok()? }))
    }
}

/// A node's places with programs.
#[derive(Clone, Debug)]
pub(crate) struct Hooks {
    folder: PathBuf,
    filters_only: bool,
}

impl Hooks {
    /// Pinned in this folder.
    pub(crate) fn pinned(folder: PathBuf) -> Self {
        Self { folder, filters_only: false }
    }

    /// Packets by filters, whatever the kernel has. A link of the same name is taken over.
    pub(crate) fn by_filters(self) -> Self {
        Self { filters_only: true, ..self }
    }

    /// Attaches a program under a name, in place of the one that is there.
    pub(crate) fn attach(&self, program: BorrowedFd<'_>, name: &str, place: Place<'_>) -> io::Result<()> {
        if let (Place::Packets(packets), true) = (place, self.filters_only) {
            return self.filter(program, name, packets);
        }
        let (target, attach_type, flags) = numbers(place);
        let pin = self.folder.join(name);
        match sys::open_pin(&pin) {
            Ok(link) => match sys::link_update(link.as_fd(), program) {
                Ok(()) => return Ok(()),
                // Its cgroup or device is gone, or its index belongs to another one now.
                Err(error) => {
                    tracing::debug!(pin = %pin.display(), %error, "link is dead, making another");
                    fs::remove_file(&pin)?;
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        match (sys::link_create(program, target, attach_type, flags), place) {
            (Ok(link), _) => sys::pin(link.as_fd(), &pin),
            (Err(error), Place::Packets(packets)) if error.raw_os_error() == Some(libc::EINVAL) => {
                self.filter(program, name, packets)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Pinned first: a filter without a pin would never be taken off.
    fn filter(&self, program: BorrowedFd<'_>, name: &str, packets: Packets) -> io::Result<()> {
        let pin = self.folder.join(packets.pin(name));
        remove_pin(&pin)?;
        sys::pin(program, &pin)?;
        let attached =
            Netlink::open().and_then(|mut netlink| netlink.set_filter(packets.filter(), program, name));
        attached.map_err(|error| reason(&error))?;
        self.detach_link(&self.folder.join(name))
    }

    /// Takes a link's program off its place and removes the pin. What is gone has nothing to be taken off.
    fn detach_link(&self, pin: &Path) -> io::Result<()> {
        if let Ok(link) = sys::open_pin(pin)
            && let Err(error) = sys::link_detach(link.as_fd())
        {
            tracing::debug!(pin = %pin.display(), %error, "link was dead already");
        }
        remove_pin(pin)
    }

    /// Whether a link is pinned under a name.
    pub(crate) fn has_link(&self, name: &str) -> bool {
        self.folder.join(name).exists()
    }

    fn pins(&self) -> Result<impl Iterator<Item = String>, NodeError> {
        let entries = fs::read_dir(&self.folder).map_err(failed("list", &self.folder))?;
        Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()))
    }

    /// Takes programs off the places with these names, alive or not, and removes the pins.
    pub(crate) fn detach_where(&self, unwanted: impl Fn(&str) -> bool) -> Result<(), NodeError> {
        for pin in self.pins()? {
            let path = self.folder.join(&pin);
            match Packets::read(&pin) {
                Some((name, packets)) if unwanted(name) => self.take_off(&path, packets)?,
                None if unwanted(&pin) => self.detach_link(&path).map_err(failed("remove pin", &path))?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes a filter off, if the pinned program is what is there: its device may be gone, and its index another's.
    fn take_off(&self, pin: &Path, packets: Packets) -> Result<(), NodeError> {
        let off = || {
            let ours = sys::program_id(sys::open_pin(pin)?.as_fd())?;
            let mut netlink = Netlink::open().map_err(|error| reason(&error))?;
            if netlink.filter(packets.filter()).map_err(|error| reason(&error))? == Some(ours) {
                netlink.remove_filter(packets.filter()).map_err(|error| reason(&error))?;
            }
            Ok(())
        };
        off().map_err(failed("take off the filter of", pin))?;
        remove_pin(pin).map_err(failed("remove pin", pin))
    }

    /// Takes all programs off, and removes the pins and their folder.
    pub(crate) fn remove(&self) -> Result<(), NodeError> {
        self.detach_where(|_| true)?;
        fs::remove_dir(&self.folder).map_err(failed("remove folder", &self.folder))
    }

    /// What is wrong with a place; `None` if its program is called there. Asked in the namespace of its device.
    pub(crate) fn missing(&self, name: &str, packets: Option<Packets>) -> Option<String> {
        let device = packets.map(|packets| u64::from(packets.index));
        match (sys::open_pin(&self.folder.join(name)), packets) {
            (Ok(link), _) => match sys::link_info(link.as_fd()) {
                Err(error) => Some(format!("it can't be looked at: {error}")),
                Ok(info) if info.program == 0 => Some("it has no program".to_owned()),
                Ok(info) if info.target == 0 => Some("what it was attached to is gone".to_owned()),
                Ok(info) if device.is_some_and(|index| index != info.target) => {
                    Some("it is attached to another device".to_owned())
                }
                Ok(_) => None,
            },
            (Err(error), Some(packets)) if error.kind() == io::ErrorKind::NotFound => {
                self.missing_filter(name, packets)
            }
            (Err(error), _) => Some(unopened(&error)),
        }
    }

    fn missing_filter(&self, name: &str, packets: Packets) -> Option<String> {
        let program = match sys::open_pin(&self.folder.join(packets.pin(name))) {
            Ok(program) => program,
            Err(error) => return Some(unopened(&error)),
        };
        let there = Netlink::open().and_then(|mut netlink| netlink.filter(packets.filter()));
        match (there.map_err(|error| reason(&error)), sys::program_id(program.as_fd())) {
            (Ok(Some(there)), Ok(ours)) if there == ours => None,
            (Ok(_), Ok(_)) => Some("its filter is gone".to_owned()),
            (Err(error), _) | (_, Err(error)) => Some(format!("it can't be looked at: {error}")),
        }
    }
}

fn unopened(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::NotFound {
        "it is not attached".to_owned()
    } else {
        format!("its pin can't be opened: {error}")
    }
}

/// Target, attach type and flags of a link.
fn numbers(place: Place<'_>) -> (u32, u32, u32) {
    match place {
        Place::Cgroup(folder, attach_type) => {
            (u32::try_from(folder.as_raw_fd()).unwrap_or(u32::MAX), attach_type, 0)
        }
        Place::Packets(Packets { index, direction: Direction::In, .. }) => (index, TCX_INGRESS, 0),
        Place::Packets(Packets { index, direction: Direction::Out, .. }) => (index, TCX_EGRESS, 0),
        Place::Frames { index, flags } => (index, XDP, flags),
    }
}

/// The kernel's own reason, where it gave one: callers tell devices that are gone by it.
fn reason(error: &weft_cni_netlink::Error) -> io::Error {
    if let weft_cni_netlink::Error::Refused { errno, .. } = error {
        (*errno).into()
    } else {
        io::Error::other(error.to_string())
    }
}

fn remove_pin(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pin_of_a_filter_says_where_it_is() {
        let packets = Packets { index: 12, direction: Direction::Out, turn: 1 };
        let pin = packets.pin("pod_12_way");
        let (name, read) = Packets::read(&pin).unwrap();
        assert_eq!((name, read.filter()), ("pod_12_way", packets.filter()));
        assert!(Packets::read("pod_12_way").is_none());
    }
}
