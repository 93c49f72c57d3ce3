//! What a cluster was made with, kept in its data directory, so that it resumes as it was.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use ipnetwork::{IpNetwork, Ipv4Network};
use serde::{Deserialize, Serialize};

use crate::pki;
use crate::ranges::{self, Family as _, PerFamily};

/// Name that the cluster DNS answers for.
pub(crate) const DOMAIN: &str = "cluster.local";
/// Port of the kubelet on each node.
pub(crate) const KUBELET_PORT: u16 = 10250;

/// Everything that must not change between two starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cluster {
    /// Addresses of all pods; the first range's family is the cluster's primary one.
    pub(crate) cluster_cidr: PerFamily<IpNetwork>,
    /// Addresses of all Services.
    pub(crate) service_cidr: PerFamily<IpNetwork>,
    /// Network that joins the nodes, and holds this machine's address where it has none of its own. Has the pods' families.
    pub(crate) underlay_cidr: PerFamily<IpNetwork>,
    pub(crate) nodes: Vec<String>,
    /// Addresses for Services of type LoadBalancer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) load_balancer_pools: Vec<IpNetwork>,
}

/// What was asked for; `None` is as it is, or the default.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) nodes: Option<u8>,
    pub(crate) cluster_cidr: Option<PerFamily<IpNetwork>>,
    pub(crate) service_cidr: Option<PerFamily<IpNetwork>>,
    /// These alone may be others than the cluster was made with.
    pub(crate) load_balancer_pools: Option<Vec<IpNetwork>>,
}

/// Why the cluster's record can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot read {path:?}")]
    Read {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path:?} is damaged")]
    Damaged {
        path: std::path::PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("cannot keep the cluster's record")]
    Write(#[from] pki::Error),
    #[error(
        "this cluster was made with {present} node(s), not {wanted}; remove it first with `weft down --purge`"
    )]
    OtherNodes { present: usize, wanted: usize },
    #[error(
        "this cluster was made with {flag} {present}, not {wanted}; remove it first with `weft down --purge`"
    )]
    OtherRange { flag: &'static str, present: PerFamily<IpNetwork>, wanted: PerFamily<IpNetwork> },
    #[error("{}", .0.join("; "))]
    Ranges(Vec<String>),
}

impl Cluster {
    /// The record in the data directory if it is as wanted, or what a new one would say; makes nothing.
    pub(crate) fn plan(path: &Path, wanted: &Wanted, hostname: &str) -> Result<Self, Error> {
        let Some(cluster) = Self::read(path)? else { return Self::new(wanted, hostname)?.with_pools(wanted) };
        let (present, nodes) = (cluster.nodes.len(), wanted.nodes.map_or(cluster.nodes.len(), usize::from));
        if nodes != present {
            return Err(Error::OtherNodes { present, wanted: nodes });
        }
        for (flag, present, wanted) in [
            ("--cluster-cidr", cluster.cluster_cidr, wanted.cluster_cidr),
            ("--service-cidr", cluster.service_cidr, wanted.service_cidr),
        ] {
            if let Some(wanted) = wanted.filter(|wanted| *wanted != present) {
                return Err(Error::OtherRange { flag, present, wanted });
            }
        }
        cluster.with_pools(wanted)
    }

    fn with_pools(mut self, wanted: &Wanted) -> Result<Self, Error> {
        let Some(pools) = &wanted.load_balancer_pools else { return Ok(self) };
        let mistakes = ranges::pool_mistakes(pools, self.cluster_cidr, self.service_cidr);
        if !mistakes.is_empty() {
            return Err(Error::Ranges(mistakes));
        }
        self.load_balancer_pools.clone_from(pools);
        Ok(self)
    }

    /// The record in the data directory, or a new one.
    pub(crate) fn open(path: &Path, wanted: &Wanted, hostname: &str) -> Result<Self, Error> {
        let cluster = Self::plan(path, wanted, hostname)?;
        if Self::read(path)?.as_ref() != Some(&cluster) {
            let text = serde_json::to_string_pretty(&cluster)
                .map_err(|source| Error::Damaged { path: path.to_path_buf(), source })?;
            pki::write(path, &text, 0o644)?;
        }
        Ok(cluster)
    }

    /// The record, if there is one.
    pub(crate) fn read(path: &Path) -> Result<Option<Self>, Error> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::Read { path: path.to_path_buf(), source }),
        };
        let cluster = serde_json::from_str(&text);
        cluster.map(Some).map_err(|source| Error::Damaged { path: path.to_path_buf(), source })
    }

    fn new(wanted: &Wanted, hostname: &str) -> Result<Self, Error> {
        let standard = |second| {
            let network = Ipv4Network::new(Ipv4Addr::new(10, second, 0, 0), 16);
            PerFamily::single(network.expect("the prefix is within 0..=32").into())
        };
        let nodes = wanted.nodes.unwrap_or(1);
        let cluster_cidr = wanted.cluster_cidr.unwrap_or_else(|| standard(42));
        let service_cidr = wanted.service_cidr.unwrap_or_else(|| standard(43));
        let mistakes = ranges::mistakes(cluster_cidr, service_cidr, nodes.into());
        if !mistakes.is_empty() {
            return Err(Error::Ranges(mistakes));
        }
        let others: Vec<_> = cluster_cidr.iter().chain(service_cidr.iter()).collect();
        let underlay = cluster_cidr.iter().filter_map(|range| ranges::underlay(range.is_v6(), &others));
        let none = || Error::Ranges(vec!["they leave no room for the network between the nodes".to_owned()]);
        let names = if nodes == 1 {
            vec![node_name(hostname)]
        } else {
            (1..=nodes).map(|number| format!("node-{number}")).collect()
        };
        let underlay_cidr = PerFamily::of(underlay).ok_or_else(none)?;
        let load_balancer_pools = Vec::new();
        Ok(Self { cluster_cidr, service_cidr, underlay_cidr, nodes: names, load_balancer_pools })
    }

    /// First address of the primary service range: the API's own Service.
    pub(crate) fn api_service_ip(&self) -> IpAddr {
        ranges::nth(self.service_cidr.primary, 1)
    }

    /// Tenth addresses of the service ranges: the cluster DNS.
    pub(crate) fn dns_ips(&self) -> PerFamily<IpAddr> {
        self.service_cidr.nth(10)
    }

    /// This machine's addresses on the underlay.
    pub(crate) fn underlay_gateway(&self) -> PerFamily<IpAddr> {
        self.underlay_cidr.nth(1)
    }

    /// The addresses of a node on the underlay; nodes are counted from 0.
    pub(crate) fn underlay_addresses(&self, index: usize) -> PerFamily<IpAddr> {
        self.underlay_cidr.nth(2 + u32::try_from(index).unwrap_or(0))
    }
}

/// A host name as a node's name: lower case, and a DNS subdomain.
fn node_name(hostname: &str) -> String {
    let name: String = hostname
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.' { c } else { '-' })
        .collect();
    let name = name.trim_matches(['-', '.']).to_owned();
    if name.is_empty() { "node-1".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(nodes: Option<u8>, ranges: Option<(&str, &str)>) -> Wanted {
        let (cluster_cidr, service_cidr) =
            ranges.map(|(a, b)| (a.parse().unwrap(), b.parse().unwrap())).unzip();
        Wanted { nodes, cluster_cidr, service_cidr, load_balancer_pools: None }
    }

    fn file(label: &str) -> std::path::PathBuf {
        std::env::temp_dir().join(format!("weft-cluster-{label}-{}.json", std::process::id()))
    }

    #[test]
    fn a_cluster_resumes_as_it_was_made() {
        let path = file("resume");
        let dual = ("10.42.0.0/16,fd42::/56", "10.43.0.0/16,fd43::/112");
        let made = Cluster::open(&path, &wanted(Some(3), Some(dual)), "Host").unwrap();
        assert_eq!(made.nodes, ["node-1", "node-2", "node-3"]);
        assert_eq!(made.underlay_cidr.to_string(), "10.44.0.0/24,fd44::/64");
        assert_eq!(Cluster::open(&path, &wanted(None, None), "Host").unwrap(), made);
        assert_eq!(Cluster::open(&path, &wanted(Some(3), Some(dual)), "Host").unwrap(), made);
        let other = Cluster::open(&path, &wanted(Some(2), None), "Host").unwrap_err();
        assert!(other.to_string().contains("3 node(s), not 2"), "{other}");
        let ranges = Some(("10.42.0.0/16", "10.43.0.0/16"));
        let other = Cluster::open(&path, &wanted(None, ranges), "Host").unwrap_err();
        assert!(other.to_string().contains("fd42::/56, not 10.42.0.0/16"), "{other}");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn pools_may_change_from_start_to_start() {
        let path = file("pools");
        let mut asked = wanted(Some(1), None);
        assert!(Cluster::open(&path, &asked, "h").unwrap().load_balancer_pools.is_empty());
        let pools: Vec<IpNetwork> = vec!["192.0.2.0/28".parse().unwrap(), "2001:db8::/120".parse().unwrap()];
        asked.load_balancer_pools = Some(pools.clone());
        assert_eq!(Cluster::open(&path, &asked, "h").unwrap().load_balancer_pools, pools);
        assert_eq!(Cluster::open(&path, &wanted(None, None), "h").unwrap().load_balancer_pools, pools);
        asked.load_balancer_pools = Some(vec!["10.43.7.0/24".parse().unwrap()]);
        let refused = Cluster::open(&path, &asked, "h").unwrap_err().to_string();
        assert_eq!(refused, "--load-balancer-pool: 10.43.7.0/24 overlaps with 10.43.0.0/16");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_record_of_the_first_version_still_reads() {
        let path = file("old");
        let text = r#"{"cluster_cidr": "10.42.0.0/16", "service_cidr": "10.43.0.0/16",
            "underlay_cidr": "10.44.0.0/24", "nodes": ["vm"]}"#;
        std::fs::write(&path, text).unwrap();
        let read = Cluster::open(&path, &wanted(None, None), "vm").unwrap();
        assert_eq!(read, Cluster::new(&wanted(None, None), "vm").unwrap());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn names_and_addresses_follow_from_the_record() {
        let cluster = Cluster::new(&wanted(None, None), "My_Host.local.").unwrap();
        assert_eq!(cluster.nodes, ["my-host.local"]);
        assert_eq!(cluster.api_service_ip().to_string(), "10.43.0.1");
        assert_eq!(cluster.dns_ips().to_string(), "10.43.0.10");
        assert_eq!(cluster.underlay_addresses(1).to_string(), "10.44.0.3");
        let dual = ("fd42::/56,10.42.0.0/16", "fd43::/112,10.43.0.0/16");
        let cluster = Cluster::new(&wanted(Some(2), Some(dual)), "x").unwrap();
        assert_eq!(cluster.api_service_ip().to_string(), "fd43::1");
        assert_eq!(cluster.dns_ips().to_string(), "fd43::a,10.43.0.10");
        assert_eq!(cluster.underlay_addresses(1).to_string(), "fd44::3,10.44.0.3");
    }
}
