//! Owns the choice of load-balancer addresses: which of the pools' a Service gets, keeps, or shares. Pure.

use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1::Service;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use weft_control_client::ObjectKey;

/// The class of Services that want an address of the pools though other controllers give out some, too.
pub(crate) const CLASS: &str = "weft.dev/pool";
/// The addresses that a Service asks for, separated by commas; `spec.loadBalancerIP` says one as well.
const WANTED: &str = "weft.dev/load-balancer-addresses";
/// Services that say the same here may have the same address, as long as their ports differ.
const SHARED: &str = "weft.dev/load-balancer-share";

/// What matters about a Service here.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Claim {
    pub(crate) families: Vec<bool>,
    asked: Vec<String>,
    share: Option<String>,
    ports: BTreeSet<(String, i32)>,
    /// Traffic of policy Local goes where the Service's own pods are: only Services of the same pods can share it.
    local_to: Option<String>,
}

/// Who has an address, and on what terms.
pub(crate) type Holders = BTreeMap<ObjectKey, (Claim, Vec<IpAddr>)>;

/// Why a Service gets no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("no address is free in the pools {0}")]
    Full(String),
    #[error("{0:?} is not an IP address")]
    NotAnAddress(String),
    #[error("{0} is not in the pools {1}")]
    Outside(IpAddr, String),
    #[error("{0} is in use by Service {1}")]
    Taken(IpAddr, ObjectKey),
}

/// What a Service claims; nothing if it wants no address of ours.
pub(crate) fn claim(service: &Service) -> Option<Claim> {
    let spec = service.spec.as_ref()?;
    let ours = spec.load_balancer_class.as_deref().is_none_or(|class| class == CLASS);
    if spec.type_.as_deref() != Some("LoadBalancer") || !ours || service.metadata.deletion_timestamp.is_some()
    {
        return None;
    }
    let annotation = |key: &str| service.metadata.annotations.as_ref().and_then(|all| all.get(key)).cloned();
    let listed = annotation(WANTED).unwrap_or_default();
    let mut asked: Vec<String> =
        listed.split(',').map(str::trim).filter(|one| !one.is_empty()).map(str::to_owned).collect();
    if asked.is_empty() {
        asked.extend(spec.load_balancer_ip.clone().filter(|one| !one.is_empty()));
    }
    let local = spec.external_traffic_policy.as_deref() == Some("Local");
    let ports = spec.ports.iter().flatten();
    Some(Claim {
        families: spec.ip_families.iter().flatten().map(|family| family == "IPv6").collect(),
        asked,
        share: annotation(SHARED).filter(|key| !key.is_empty()),
        ports: ports.map(|port| (port.protocol.clone().unwrap_or_else(|| "TCP".into()), port.port)).collect(),
        local_to: local.then(|| {
            format!("{}/{:?}", service.metadata.namespace.as_deref().unwrap_or_default(), spec.selector)
        }),
    })
}

fn may_share(one: &Claim, other: &Claim) -> bool {
    one.share.is_some()
        && one.share == other.share
        && one.ports.is_disjoint(&other.ports)
        && one.local_to == other.local_to
}

/// The addresses of one Service: those that it has as long as they fit, else asked ones, shared ones, free ones; one of
/// each family that there are pools of.
pub(crate) fn choose(
    pools: &[IpNetwork],
    key: &ObjectKey,
    claim: &Claim,
    has: &[IpAddr],
    holders: &Holders,
) -> Result<Vec<IpAddr>, Refusal> {
    let search = Search { pools, key, claim, holders };
    if !claim.asked.is_empty() {
        return claim.asked.iter().map(|asked| search.asked(asked)).collect();
    }
    let mut chosen = Vec::new();
    for ipv6 in &claim.families {
        if !pools.iter().any(|pool| pool.is_ipv6() == *ipv6) {
            continue;
        }
        let kept = has.iter().copied().find(|one| one.is_ipv6() == *ipv6 && search.fits(*one));
        chosen.extend(kept.or_else(|| search.shared(*ipv6)).or_else(|| search.free(*ipv6)));
    }
    // One family served is better than none.
    if chosen.is_empty() {
        return Err(Refusal::Full(names(pools)));
    }
    Ok(chosen)
}

pub(crate) fn names(pools: &[IpNetwork]) -> String {
    pools.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

struct Search<'a> {
    pools: &'a [IpNetwork],
    key: &'a ObjectKey,
    claim: &'a Claim,
    holders: &'a Holders,
}

impl Search<'_> {
    fn in_pools(&self, address: IpAddr) -> bool {
        self.pools.iter().any(|pool| holds(pool, address))
    }

    /// A Service that has the address and doesn't share it with this one.
    fn rival(&self, address: IpAddr) -> Option<&ObjectKey> {
        let others = self.holders.iter().filter(|(key, (_, has))| *key != self.key && has.contains(&address));
        others
            .map(|(key, (claim, _))| (key, claim))
            .find(|(_, claim)| !may_share(claim, self.claim))
            .map(|(key, _)| key)
    }

    fn fits(&self, address: IpAddr) -> bool {
        self.in_pools(address) && self.rival(address).is_none()
    }

    fn asked(&self, text: &str) -> Result<IpAddr, Refusal> {
        let address: IpAddr = text.parse().map_err(|_no_address| Refusal::NotAnAddress(text.to_owned()))?;
        if !self.in_pools(address) {
            return Err(Refusal::Outside(address, names(self.pools)));
        }
        match self.rival(address) {
            Some(rival) => Err(Refusal::Taken(address, rival.clone())),
            None => Ok(address),
        }
    }

    fn shared(&self, ipv6: bool) -> Option<IpAddr> {
        let mates =
            self.holders.iter().filter(|(key, (claim, _))| *key != self.key && may_share(claim, self.claim));
        mates.flat_map(|(_, (_, has))| has).copied().find(|one| one.is_ipv6() == ipv6 && self.fits(*one))
    }

    /// The first free one; among one more than are taken there must be one, so a pool may be as large as it likes.
    fn free(&self, ipv6: bool) -> Option<IpAddr> {
        let taken: BTreeSet<IpAddr> = self
            .holders
            .iter()
            .filter(|(key, _)| *key != self.key)
            .flat_map(|(_, (_, has))| has)
            .copied()
            .collect();
        let pools = self.pools.iter().filter(|pool| pool.is_ipv6() == ipv6);
        pools.flat_map(|pool| addresses(pool).take(taken.len() + 1)).find(|one| !taken.contains(one))
    }
}

/// First and last address that a pool gives: of a network with room for it neither its own address nor the last one,
/// which is the broadcast address for IPv4.
fn bounds(pool: &IpNetwork) -> (u128, u128) {
    let (first, host_bits) = match pool {
        IpNetwork::V4(v4) => (u128::from(u32::from(v4.network())), 32 - v4.prefix()),
        IpNetwork::V6(v6) => (u128::from(v6.network()), 128 - v6.prefix()),
    };
    let last = first + (1_u128.checked_shl(u32::from(host_bits)).map_or(u128::MAX - first, |size| size - 1));
    if host_bits < 2 { (first, last) } else { (first + 1, last - 1) }
}

fn holds(pool: &IpNetwork, address: IpAddr) -> bool {
    let bits = match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    };
    let (first, last) = bounds(pool);
    pool.is_ipv6() == address.is_ipv6() && (first..=last).contains(&bits)
}

fn addresses(pool: &IpNetwork) -> impl Iterator<Item = IpAddr> + use<> {
    let (first, last) = bounds(pool);
    let ipv6 = pool.is_ipv6();
    (first..=last).map(move |bits| match u32::try_from(bits) {
        Ok(v4) if !ipv6 => Ipv4Addr::from(v4).into(),
        _ => Ipv6Addr::from(bits).into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn service(spec: Value, annotations: Value) -> Claim {
        let mut object = json!({"metadata": {"name": "s", "namespace": "d", "annotations": annotations}, "spec": {
            "type": "LoadBalancer", "ipFamilies": ["IPv4"], "ports": [{"port": 80}], "selector": {"a": "b"}}});
        for (key, value) in spec.as_object().unwrap() {
            object["spec"][key] = value.clone();
        }
        claim(&serde_json::from_value(object).unwrap()).unwrap()
    }

    fn pools(list: &[&str]) -> Vec<IpNetwork> {
        list.iter().map(|one| one.parse().unwrap()).collect()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("d", name)
    }

    #[test]
    fn free_addresses_of_each_family() {
        let pools = pools(&["192.0.2.0/30", "2001:db8::/64"]);
        let dual = service(json!({"ipFamilies": ["IPv6", "IPv4"]}), json!({}));
        let mut holders = Holders::new();
        let a = choose(&pools, &key("a"), &dual, &[], &holders).unwrap();
        assert_eq!(a, [ip("2001:db8::1"), ip("192.0.2.1")]);
        holders.insert(key("a"), (dual.clone(), a.clone()));
        assert_eq!(choose(&pools, &key("a"), &dual, &a, &holders).unwrap(), a, "kept");
        let b = choose(&pools, &key("b"), &dual, &[], &holders).unwrap();
        assert_eq!(b, [ip("2001:db8::2"), ip("192.0.2.2")]);
        holders.insert(key("b"), (dual.clone(), b));
        let c = choose(&pools, &key("c"), &dual, &[], &holders).unwrap();
        assert_eq!(c, [ip("2001:db8::3")], "one family is better than none");
        let four = service(json!({}), json!({}));
        let error = choose(&pools, &key("d"), &four, &[], &holders).unwrap_err();
        assert_eq!(error.to_string(), "no address is free in the pools 192.0.2.0/30, 2001:db8::/64");
    }

    #[test]
    fn asked_for_and_refused() {
        let pools = pools(&["192.0.2.0/28"]);
        let held = service(json!({}), json!({}));
        let holders = Holders::from([(key("a"), (held, vec![ip("192.0.2.5")]))]);
        let ask = |spec: Value, annotations: Value| {
            choose(&pools, &key("b"), &service(spec, annotations), &[], &holders)
                .map_err(|error| error.to_string())
        };
        assert_eq!(ask(json!({"loadBalancerIP": "192.0.2.6"}), json!({})), Ok(vec![ip("192.0.2.6")]));
        assert_eq!(ask(json!({}), json!({WANTED: " 192.0.2.7 "})), Ok(vec![ip("192.0.2.7")]));
        assert_eq!(
            ask(json!({"loadBalancerIP": "192.0.2.5"}), json!({})),
            Err("192.0.2.5 is in use by Service d/a".into())
        );
        for (asked, why) in [
            ("192.0.2.15", "192.0.2.15 is not in the pools 192.0.2.0/28"),
            ("x", "\"x\" is not an IP address"),
        ] {
            assert_eq!(ask(json!({"loadBalancerIP": asked}), json!({})), Err(why.into()));
        }
    }

    #[test]
    fn sharing() {
        let pools = pools(&["192.0.2.0/29"]);
        let share = json!({SHARED: "edge"});
        let http = service(json!({}), share.clone());
        let holders = Holders::from([(key("http"), (http, vec![ip("192.0.2.1")]))]);
        let rows = [
            (json!({"ports": [{"port": 443}]}), share.clone(), "192.0.2.1"),
            (json!({"ports": [{"port": 80, "protocol": "UDP"}]}), share.clone(), "192.0.2.1"),
            (json!({"ports": [{"port": 443}, {"port": 80}]}), share.clone(), "192.0.2.2"),
            (json!({"ports": [{"port": 443}]}), json!({SHARED: "other"}), "192.0.2.2"),
            (json!({"ports": [{"port": 443}]}), json!({}), "192.0.2.2"),
            (json!({"ports": [{"port": 443}], "externalTrafficPolicy": "Local"}), share.clone(), "192.0.2.2"),
        ];
        for (spec, annotations, expected) in rows {
            let claim = service(spec.clone(), annotations);
            assert_eq!(choose(&pools, &key("b"), &claim, &[], &holders).unwrap(), [ip(expected)], "{spec}");
        }
        let local = |selector: &str| {
            service(json!({"externalTrafficPolicy": "Local", "selector": {"a": selector}}), share.clone())
        };
        assert!(!may_share(&local("x"), &local("x")), "the same port");
        let mut other = local("x");
        other.ports = BTreeSet::from([("TCP".to_owned(), 443)]);
        assert!(may_share(&local("x"), &other) && !may_share(&local("y"), &other));
    }

    #[test]
    fn other_services_are_left_alone() {
        let read =
            |spec: Value| claim(&serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap());
        assert!(read(json!({"type": "ClusterIP"})).is_none());
        assert!(read(json!({"type": "LoadBalancer", "loadBalancerClass": "example.com/lb"})).is_none());
        assert!(read(json!({"type": "LoadBalancer", "loadBalancerClass": CLASS})).is_some());
    }

    #[test]
    fn small_and_large_pools() {
        let all =
            |pool: &str| addresses(&pool.parse().unwrap()).take(3).map(|a| a.to_string()).collect::<Vec<_>>();
        assert_eq!(all("192.0.2.9/32"), ["192.0.2.9"]);
        assert_eq!(all("192.0.2.8/31"), ["192.0.2.8", "192.0.2.9"]);
        assert_eq!(all("192.0.2.8/30"), ["192.0.2.9", "192.0.2.10"]);
        assert_eq!(all("::/0"), ["::1", "::2", "::3"]);
    }
}
