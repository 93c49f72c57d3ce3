//! The subnets that pods get their addresses from.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::Deserialize;

use crate::ConfigError;

/// Where addresses come from: one subnet, or one of each family. A pod has an address of each, the first's being its primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ipam {
    /// The subnets: one or two.
    pub ranges: Vec<Range>,
}

/// A subnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The pods' subnet.
    pub subnet: IpNetwork,
    /// The bridge's address in it: the first, if nothing else is said.
    pub gateway: IpAddr,
}

impl Range {
    /// An address of the subnet, with the subnet's prefix length.
    pub fn network(&self, address: IpAddr) -> IpNetwork {
        // The prefix is one that a subnet of the family has already.
        IpNetwork::new(address, self.subnet.prefix()).unwrap_or(self.subnet)
    }
}

/// `{"subnet", "gateway"}`, or `{"ranges": [{"subnet", "gateway"}, …]}`, or with a list around each range as host-local has it.
#[derive(Deserialize)]
pub(crate) struct RawIpam {
    #[serde(flatten)]
    one: RawRange,
    ranges: Option<Vec<RawRanges>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawRanges {
    One(RawRange),
    Set(Vec<RawRange>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawRange {
    subnet: Option<IpNetwork>,
    gateway: Option<IpAddr>,
    range_start: Option<IpAddr>,
    range_end: Option<IpAddr>,
}

impl RawIpam {
    pub(crate) fn check(self) -> Result<Ipam, ConfigError> {
        let alone = self.one.subnet.is_some() || self.one.gateway.is_some();
        let ranges = match self.ranges {
            Some(_) if alone => return Err(invalid("ipam", "has both a subnet and ranges")),
            Some(sets) => sets.into_iter().map(RawRanges::check).collect::<Result<_, _>>()?,
            None => vec![self.one],
        };
        let ranges = ranges.into_iter().map(RawRange::check).collect::<Result<Vec<_>, _>>()?;
        let of_a_family = |v4: bool| ranges.iter().filter(|range| range.subnet.is_ipv4() == v4).count();
        if ranges.is_empty() {
            return Err(invalid("ipam.ranges", "is empty"));
        }
        if of_a_family(true) > 1 || of_a_family(false) > 1 {
            return Err(invalid("ipam.ranges", "more than one of a family"));
        }
        Ok(Ipam { ranges })
    }
}

impl RawRanges {
    fn check(self) -> Result<RawRange, ConfigError> {
        match self {
            Self::One(range) => Ok(range),
            Self::Set(ranges) => match <[RawRange; 1]>::try_from(ranges) {
                Ok([range]) => Ok(range),
                Err(_) => Err(invalid("ipam.ranges", "a list within it must have one range")),
            },
        }
    }
}

impl RawRange {
    fn check(self) -> Result<Range, ConfigError> {
        let subnet = self.subnet.ok_or_else(|| invalid("ipam.subnet", "is missing"))?;
        let most = if subnet.is_ipv4() { 30 } else { 126 };
        if subnet.prefix() > most {
            return Err(invalid("ipam.subnet", "has no room for a gateway and a pod"));
        }
        if subnet.ip() != subnet.network() {
            return Err(invalid("ipam.subnet", "has host bits set"));
        }
        if self.range_start.or(self.range_end).is_some() {
            return Err(invalid(
                "ipam",
                "rangeStart and rangeEnd can't be carried out: a subnet is used whole",
            ));
        }
        // As host-local has it.
        let gateway = match self.gateway {
            Some(gateway) => gateway,
            None => subnet.iter().nth(1).unwrap_or_else(|| subnet.ip()),
        };
        let broadcast = subnet.is_ipv4() && gateway == subnet.broadcast();
        if !subnet.contains(gateway) || gateway == subnet.network() || broadcast {
            return Err(invalid("ipam.gateway", "not an address of the subnet"));
        }
        Ok(Range { subnet, gateway })
    }
}

fn invalid(field: &'static str, reason: &'static str) -> ConfigError {
    ConfigError::Invalid { field, reason }
}
