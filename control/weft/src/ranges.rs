//! The cluster's address families: a value for each, and what the ranges of pods and Services must be like.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use weft_control_controllers::{NODE_PREFIX_V4, NODE_PREFIX_V6};

/// Largest ranges of Services: what the API server keeps count of.
const SERVICES_PREFIX_V4: u8 = 16;
const SERVICES_PREFIX_V6: u8 = 108;
/// Smallest ranges of Services: the cluster DNS has the tenth address.
const SERVICES_LONGEST_V4: u8 = 28;
const SERVICES_LONGEST_V6: u8 = 124;
/// Largest difference between the cluster's IPv6 range and a node's, as upstream bounds it.
const NODE_BITS_V6: u8 = 16;

/// A range or an address: something of one family.
pub(crate) trait Family: Copy {
    fn is_v6(self) -> bool;
}

impl Family for IpAddr {
    fn is_v6(self) -> bool {
        self.is_ipv6()
    }
}

impl Family for IpNetwork {
    fn is_v6(self) -> bool {
        self.is_ipv6()
    }
}

/// One value, or two of different families; the first is of the primary family. Written with a comma between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PerFamily<T> {
    pub(crate) primary: T,
    pub(crate) secondary: Option<T>,
}

/// Why a list isn't one value for each family.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ParseError {
    #[error("{0:?} is neither an IPv4 nor an IPv6 value of the form wanted")]
    Value(String),
    #[error("{0} values, and there are two address families: give one IPv4 value, one IPv6 value or both")]
    TooMany(usize),
    #[error("two values of the same address family: give one IPv4 value, one IPv6 value or both")]
    SameFamily,
}

impl<T: Family> PerFamily<T> {
    pub(crate) fn single(primary: T) -> Self {
        Self { primary, secondary: None }
    }

    /// Of the first two values that differ in family; `None` of nothing.
    pub(crate) fn of(values: impl IntoIterator<Item = T>) -> Option<Self> {
        let mut values = values.into_iter();
        let primary = values.next()?;
        Some(Self { primary, secondary: values.find(|value| value.is_v6() != primary.is_v6()) })
    }

    pub(crate) fn iter(self) -> impl Iterator<Item = T> {
        std::iter::once(self.primary).chain(self.secondary)
    }

    /// The value of a family.
    pub(crate) fn family(self, v6: bool) -> Option<T> {
        self.iter().find(|value| value.is_v6() == v6)
    }

    pub(crate) fn map<U>(self, change: impl Fn(T) -> U) -> PerFamily<U> {
        PerFamily { primary: change(self.primary), secondary: self.secondary.map(change) }
    }
}

impl PerFamily<IpNetwork> {
    /// The address at a distance from the beginning of each range.
    pub(crate) fn nth(self, by: u32) -> PerFamily<IpAddr> {
        self.map(|range| nth(range, by))
    }
}

/// The address at a distance from a range's beginning.
pub(crate) fn nth(range: IpNetwork, by: u32) -> IpAddr {
    match range {
        IpNetwork::V4(range) => Ipv4Addr::from(u32::from(range.network()).wrapping_add(by)).into(),
        IpNetwork::V6(range) => Ipv6Addr::from(u128::from(range.network()).wrapping_add(by.into())).into(),
    }
}

impl<T: Family + FromStr> FromStr for PerFamily<T> {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let value =
            |text: &str| text.trim().parse::<T>().map_err(|_unparsed| ParseError::Value(text.to_owned()));
        let values = text.split(',').map(value).collect::<Result<Vec<T>, _>>()?;
        match *values.as_slice() {
            [primary] => Ok(Self::single(primary)),
            [first, second] if first.is_v6() == second.is_v6() => Err(ParseError::SameFamily),
            [primary, secondary] => Ok(Self { primary, secondary: Some(secondary) }),
            _ => Err(ParseError::TooMany(values.len())),
        }
    }
}

impl<T: fmt::Display> fmt::Display for PerFamily<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.primary.fmt(f)?;
        match &self.secondary {
            Some(secondary) => write!(f, ",{secondary}"),
            None => Ok(()),
        }
    }
}

impl<T: fmt::Display> Serialize for PerFamily<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, T: Family + FromStr> Deserialize<'de> for PerFamily<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Every reason why these ranges can't be a cluster's of so many nodes.
pub(crate) fn mistakes(
    cluster: PerFamily<IpNetwork>,
    services: PerFamily<IpNetwork>,
    nodes: usize,
) -> Vec<String> {
    let mut wrong = Vec::new();
    for (flag, ranges) in [("--cluster-cidr", cluster), ("--service-cidr", services)] {
        wrong.extend(ranges.iter().filter_map(form).map(|reason| format!("{flag}: {reason}")));
    }
    wrong.extend(
        cluster.iter().filter_map(|range| too_few(range, nodes)).map(|why| format!("--cluster-cidr: {why}")),
    );
    wrong.extend(services.iter().filter_map(service_size).map(|why| format!("--service-cidr: {why}")));
    if cluster.primary.is_v6() != services.primary.is_v6() {
        wrong.push(format!(
            "--cluster-cidr begins with {} and --service-cidr with {}: both must begin with the primary family",
            name(cluster.primary),
            name(services.primary)
        ));
    }
    for range in services.iter().filter(|range| cluster.family(range.is_v6()).is_none()) {
        wrong.push(format!("--service-cidr: {range} is {}, and pods have no such addresses", name(range)));
    }
    for (a, b) in cluster.iter().flat_map(|a| services.iter().map(move |b| (a, b))) {
        if overlap(a, b) {
            wrong.push(format!("the pods' range {a} and the Services' range {b} overlap"));
        }
    }
    wrong
}

/// What is wrong with the pools of load-balancer addresses.
pub(crate) fn pool_mistakes(
    pools: &[IpNetwork],
    cluster: PerFamily<IpNetwork>,
    services: PerFamily<IpNetwork>,
) -> Vec<String> {
    let mut wrong = Vec::new();
    for (index, pool) in pools.iter().enumerate() {
        wrong.extend(form(*pool));
        let others = cluster.iter().chain(services.iter()).chain(pools[..index].iter().copied());
        let clashes = others.filter(|other| overlap(*pool, *other));
        wrong.extend(clashes.map(|other| format!("{pool} overlaps with {other}")));
    }
    wrong.into_iter().map(|one| format!("--load-balancer-pool: {one}")).collect()
}

fn name(range: IpNetwork) -> &'static str {
    if range.is_ipv6() { "IPv6" } else { "IPv4" }
}

/// Whether two ranges have an address in common.
pub(crate) fn overlap(a: IpNetwork, b: IpNetwork) -> bool {
    a.contains(b.network()) || b.contains(a.network())
}

fn form(range: IpNetwork) -> Option<String> {
    if range.ip() != range.network() {
        return Some(format!(
            "{range} has host bits set; its range is {}/{}",
            range.network(),
            range.prefix()
        ));
    }
    let special = match range.network() {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_multicast() || ip.is_link_local() || ip.is_unspecified(),
        IpAddr::V6(ip) => {
            ip.is_loopback()
                || ip.is_multicast()
                || ip.is_unicast_link_local()
                || ip.is_unspecified()
                || ip.to_ipv4_mapped().is_some()
        }
    };
    special.then(|| format!("{range} is not a range of ordinary addresses"))
}

fn too_few(range: IpNetwork, nodes: usize) -> Option<String> {
    let node = if range.is_ipv6() { NODE_PREFIX_V6 } else { NODE_PREFIX_V4 };
    let Some(bits) = node.checked_sub(range.prefix()) else {
        return Some(format!("{range} is smaller than the /{node} of one node"));
    };
    if range.is_ipv6() && bits > NODE_BITS_V6 {
        let least = node - NODE_BITS_V6;
        return Some(format!(
            "{range} is too large for nodes with a /{node} each: give a /{least} or smaller"
        ));
    }
    let room = 1_u64 << bits;
    let wanted = u64::try_from(nodes).unwrap_or(u64::MAX);
    (room < wanted).then(|| format!("{range} has room for {room} nodes with a /{node} each, not {wanted}"))
}

fn service_size(range: IpNetwork) -> Option<String> {
    let bounds = match range {
        IpNetwork::V4(_) => SERVICES_PREFIX_V4..=SERVICES_LONGEST_V4,
        IpNetwork::V6(_) => SERVICES_PREFIX_V6..=SERVICES_LONGEST_V6,
    };
    let (least, most) = (bounds.start(), bounds.end());
    (!bounds.contains(&range.prefix()))
        .then(|| format!("the prefix of {range} must be within /{least} and /{most}"))
}

/// The range that joins the nodes in a family: the first of weft's own that is apart from the others.
pub(crate) fn underlay(v6: bool, others: &[IpNetwork]) -> Option<IpNetwork> {
    const CANDIDATES: u8 = 64;
    let candidate = |number: u8| -> Option<IpNetwork> {
        let number = 44_u8.checked_add(number)?;
        if v6 {
            let first = u16::from_be_bytes([0xfd, ((number / 10) << 4) | (number % 10)]);
            Ipv6Network::new(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0), 64).ok().map(Into::into)
        } else {
            Ipv4Network::new(Ipv4Addr::new(10, number, 0, 0), 24).ok().map(Into::into)
        }
    };
    (0..CANDIDATES).filter_map(candidate).find(|range| !others.iter().any(|other| overlap(*range, *other)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(text: &str) -> PerFamily<IpNetwork> {
        text.parse().unwrap()
    }

    #[test]
    fn lists_are_of_one_value_for_each_family() {
        for good in ["10.42.0.0/16", "fd42::/56", "10.42.0.0/16,fd42::/56", "fd42::/56,10.42.0.0/16"] {
            assert_eq!(ranges(good).to_string(), good);
            let json = serde_json::to_string(&ranges(good)).unwrap();
            assert_eq!(serde_json::from_str::<PerFamily<IpNetwork>>(&json).unwrap(), ranges(good));
        }
        for (wrong, expected) in [
            ("", ParseError::Value(String::new())),
            ("10.42.0.0/33", ParseError::Value("10.42.0.0/33".to_owned())),
            ("10.42.0.0/16,10.43.0.0/16", ParseError::SameFamily),
            ("10.42.0.0/16,fd42::/56,fd43::/56", ParseError::TooMany(3)),
        ] {
            assert_eq!(wrong.parse::<PerFamily<IpNetwork>>().unwrap_err(), expected, "{wrong}");
        }
    }

    #[test]
    fn ranges_that_can_work_have_no_mistakes() {
        for (cluster, services) in [
            ("10.42.0.0/16", "10.43.0.0/16"),
            ("10.42.0.0/16,fd42::/56", "10.43.0.0/16,fd43::/112"),
            ("10.42.0.0/16,fd42::/56", "10.43.0.0/16"),
            ("fd42::/48,10.42.0.0/16", "fd43::/108,10.43.0.0/24"),
            ("fd42::/56", "fd43::/112"),
        ] {
            assert_eq!(mistakes(ranges(cluster), ranges(services), 3), Vec::<String>::new(), "{cluster}");
        }
    }

    #[test]
    fn each_mistake_is_named() {
        let rows = [
            ("10.42.0.1/16", "10.43.0.0/16", "host bits"),
            ("224.0.0.0/16", "10.43.0.0/16", "ordinary"),
            ("fe80::/56", "fd43::/112", "ordinary"),
            ("10.42.0.0/25", "10.43.0.0/16", "smaller than the /24"),
            ("10.42.0.0/23", "10.43.0.0/16", "room for 2 nodes"),
            ("fd42::/40", "fd43::/112", "too large"),
            ("10.42.0.0/16", "10.112.0.0/12", "within /16 and /28"),
            ("fd42::/56", "fd43::/64", "within /108 and /124"),
            ("10.42.0.0/16,fd42::/56", "fd43::/112,10.43.0.0/16", "primary family"),
            ("10.42.0.0/16", "10.43.0.0/16,fd43::/112", "no such addresses"),
            ("10.42.0.0/16", "10.42.128.0/24", "overlap"),
        ];
        for (cluster, services, expected) in rows {
            let found = mistakes(ranges(cluster), ranges(services), 3);
            assert_eq!(found.len(), 1, "{cluster} {services}: {found:?}");
            assert!(found[0].contains(expected), "{cluster} {services}: {found:?}");
        }
        let all = mistakes(ranges("10.42.0.1/25"), ranges("fd43::/64"), 1);
        assert!(all.len() >= 4, "all at once: {all:?}");
    }

    #[test]
    fn the_underlay_keeps_apart_from_the_others() {
        assert_eq!(underlay(false, &[]).unwrap().to_string(), "10.44.0.0/24");
        assert_eq!(underlay(true, &[]).unwrap().to_string(), "fd44::/64");
        let others = ["10.44.0.0/15", "fd44::/16"].map(|text| text.parse().unwrap());
        assert_eq!(underlay(false, &others).unwrap().to_string(), "10.46.0.0/24");
        assert_eq!(underlay(true, &others).unwrap().to_string(), "fd45::/64");
    }
}
