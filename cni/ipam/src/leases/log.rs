//! The lines of the log of leases: `+10.42.1.7 container/interface`, with `-` once the address is given back.

use std::net::IpAddr;

use crate::{Lease, Owner};

/// Before an address that is held.
const HELD: char = '+';
/// Before one that was given back.
pub(super) const GIVEN_BACK: &str = "-";

/// A lease that was given.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line<'a> {
    pub(super) address: IpAddr,
    container: &'a str,
    ifname: &'a str,
    held: bool,
    /// Where it begins, in bytes.
    pub(super) at: usize,
    /// With its end.
    text: &'a str,
}

/// What a log says.
#[derive(Debug, Default)]
pub(super) struct Book<'a> {
    lines: Vec<Line<'a>>,
    /// The length of all whole lines.
    pub(super) whole_bytes: usize,
    /// The length of those that say nothing any more.
    pub(super) dead_bytes: usize,
}

/// The line of a lease, with its end.
pub(super) fn line(address: IpAddr, owner: &Owner) -> String {
    format!("{HELD}{address} {}/{}\n", owner.container, owner.ifname)
}

impl<'a> Line<'a> {
    fn read(text: &'a str, at: usize) -> Option<Self> {
        let (address, owner) = text.strip_suffix('\n')?.get(1..)?.split_once(' ')?;
        let (container, ifname) = owner.split_once('/')?;
        Some(Self {
            address: address.parse().ok()?,
            container,
            ifname,
            held: text.starts_with(HELD),
            at,
            text,
        })
    }

    pub(super) fn is_of(&self, owner: &Owner) -> bool {
        self.container == owner.container && self.ifname == owner.ifname
    }

    pub(super) fn lease(&self) -> Lease {
        let owner = Owner { container: self.container.to_owned(), ifname: self.ifname.to_owned() };
        Lease { address: self.address, owner }
    }
}

impl<'a> Book<'a> {
    pub(super) fn read(text: &'a str) -> Self {
        let mut book = Self::default();
        for text in text.split_inclusive('\n').take_while(|text| text.ends_with('\n')) {
            let line = Line::read(text, book.whole_bytes);
            book.whole_bytes += text.len();
            if line.is_none_or(|line| !line.held) {
                book.dead_bytes += text.len();
            }
            book.lines.extend(line);
        }
        book
    }

    /// The leases that are held.
    pub(super) fn held(&self) -> impl Iterator<Item = &Line<'a>> {
        self.lines.iter().filter(|line| line.held)
    }

    /// All that were given, the last one first.
    pub(super) fn last(&self) -> impl Iterator<Item = IpAddr> {
        self.lines.iter().rev().map(|line| line.address)
    }

    /// The log without what says nothing any more: the leases, and the last one of each family, held or not, as the next address
    /// follows from it.
    pub(super) fn kept(&self) -> String {
        let last = |v4: bool| self.lines.iter().rposition(|line| line.address.is_ipv4() == v4);
        let last = [last(true), last(false)];
        let kept = self.lines.iter().enumerate().filter(|(n, line)| line.held || last.contains(&Some(*n)));
        kept.map(|(_, line)| line.text).collect()
    }
}
