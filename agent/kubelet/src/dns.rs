//! Names within a pod: hostname, resolv.conf and the hosts file. Pure.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;

use crate::pod::{self, PodId};

/// Bounds of upstream's validation; what is over is cut off.
const MAX_SEARCHES: usize = 32;
const MAX_NAMESERVERS: usize = 3;
/// Longest host name that the kernel takes.
const MAX_HOSTNAME: usize = 63;

/// What resolv.conf is made from.
pub(crate) struct Cluster<'a> {
    pub(crate) dns: IpAddr,
    pub(crate) domain: &'a str,
    /// The node's own resolv.conf.
    pub(crate) host: &'a str,
}

#[derive(Default)]
struct Resolv {
    nameservers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
}

fn parse(text: &str) -> Resolv {
    let mut found = Resolv::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => found.nameservers.extend(words.next().map(str::to_owned)),
            Some("search") => found.searches = words.map(|w| w.trim_end_matches('.').to_owned()).collect(),
            Some("options") => found.options = words.map(str::to_owned).collect(),
            _ => {}
        }
    }
    found.searches.retain(|s| !s.is_empty());
    found
}

/// The content of resolv.conf by the pod's `dnsPolicy` and `dnsConfig`.
pub(crate) fn resolv_conf(pod: &Pod, cluster: &Cluster<'_>) -> String {
    let spec = pod::spec(pod);
    let host = parse(cluster.host);
    let policy = match spec.dns_policy.as_deref().unwrap_or("ClusterFirst") {
        "ClusterFirst" if pod::host_network(pod) => "Default",
        "ClusterFirstWithHostNet" => "ClusterFirst",
        policy => policy,
    };
    let mut made = match policy {
        "None" => Resolv::default(),
        "Default" => host,
        _ => {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
            let domain = cluster.domain;
            let mut searches =
                vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_owned()];
            searches.extend(host.searches);
            Resolv { nameservers: vec![cluster.dns.to_string()], searches, options: vec!["ndots:5".into()] }
        }
    };
    if let Some(config) = &spec.dns_config {
        made.nameservers.extend(config.nameservers.iter().flatten().cloned());
        made.searches.extend(config.searches.iter().flatten().cloned());
        for option in config.options.iter().flatten() {
            let Some(name) = &option.name else { continue };
            made.options.retain(|known| known.split(':').next() != Some(name));
            made.options
                .push(option.value.as_ref().map_or_else(|| name.clone(), |value| format!("{name}:{value}")));
        }
    }
    render(made)
}

fn render(mut made: Resolv) -> String {
    let mut seen = std::collections::BTreeSet::new();
    made.searches.retain(|s| seen.insert(s.clone()));
    made.searches.truncate(MAX_SEARCHES);
    let mut seen = std::collections::BTreeSet::new();
    made.nameservers.retain(|s| seen.insert(s.clone()));
    made.nameservers.truncate(MAX_NAMESERVERS);
    let mut text = String::new();
    if !made.searches.is_empty() {
        text.push_str(&format!("search {}\n", made.searches.join(" ")));
    }
    for server in &made.nameservers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !made.options.is_empty() {
        text.push_str(&format!("options {}\n", made.options.join(" ")));
    }
    text
}

/// The pod's host name and its domain (empty without subdomain).
pub(crate) fn hostname(pod: &Pod, cluster_domain: &str) -> (String, String) {
    let spec = pod::spec(pod);
    let id = PodId::of(pod);
    if let Some(own) = spec.hostname_override.as_deref().filter(|h| !h.is_empty()) {
        return (own.to_owned(), String::new());
    }
    let mut name = spec.hostname.clone().filter(|h| !h.is_empty()).unwrap_or_else(|| id.name.clone());
    name.truncate(MAX_HOSTNAME);
    let name = name.trim_end_matches(['-', '.']).to_owned();
    let domain = match spec.subdomain.as_deref().filter(|s| !s.is_empty()) {
        Some(subdomain) => format!("{subdomain}.{}.svc.{cluster_domain}", id.namespace),
        None => String::new(),
    };
    (name, domain)
}

/// The host name that the kernel gets: the full one if the pod asks for it.
pub(crate) fn kernel_hostname(pod: &Pod, cluster_domain: &str) -> String {
    let (name, domain) = hostname(pod, cluster_domain);
    let full = pod::spec(pod).set_hostname_as_fqdn.unwrap_or(false) && !domain.is_empty();
    if full { format!("{name}.{domain}") } else { name }
}

/// The hosts file of the pod's containers. With the node's network it begins with the node's own.
pub(crate) fn hosts(pod: &Pod, ips: &[IpAddr], cluster_domain: &str, node_hosts: &str) -> String {
    let mut text = if pod::host_network(pod) {
        format!("# Kubernetes-managed hosts file (host network).\n{node_hosts}")
    } else {
        let (name, domain) = hostname(pod, cluster_domain);
        let names = if domain.is_empty() { name } else { format!("{name}.{domain}\t{name}") };
        let mut text = String::from(
            "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
             fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
        );
        for ip in ips {
            text.push_str(&format!("{ip}\t{names}\n"));
        }
        text
    };
    let aliases = pod::spec(pod).host_aliases.as_deref().unwrap_or_default();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for alias in aliases {
            text.push_str(&format!(
                "{}\t{}\n",
                alias.ip,
                alias.hostnames.as_deref().unwrap_or_default().join("\t")
            ));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "web-0", "namespace": "shop"}, "spec": spec}))
            .unwrap()
    }

    fn cluster() -> Cluster<'static> {
        Cluster {
            dns: "10.43.0.10".parse().unwrap(),
            domain: "cluster.local",
            host: "nameserver 1.1.1.1\nsearch corp.example.\noptions edns0\n",
        }
    }

    #[test]
    fn resolv_conf_follows_the_policy() {
        let conf = |spec| resolv_conf(&pod(spec), &cluster());
        assert_eq!(
            conf(json!({"containers": []})),
            "search shop.svc.cluster.local svc.cluster.local cluster.local corp.example\n\
             nameserver 10.43.0.10\noptions ndots:5\n"
        );
        let default = "search corp.example\nnameserver 1.1.1.1\noptions edns0\n";
        assert_eq!(conf(json!({"containers": [], "dnsPolicy": "Default"})), default);
        assert_eq!(conf(json!({"containers": [], "hostNetwork": true})), default);
        assert_eq!(
            conf(json!({"containers": [], "dnsPolicy": "None", "dnsConfig": {"nameservers": ["9.9.9.9"],
                "searches": ["a.b"], "options": [{"name": "ndots", "value": "2"}, {"name": "rotate"}]}})),
            "search a.b\nnameserver 9.9.9.9\noptions ndots:2 rotate\n"
        );
    }

    #[test]
    fn host_names_and_hosts_file() {
        let p = pod(json!({"containers": [], "hostname": "h", "subdomain": "db", "setHostnameAsFQDN": true,
            "hostAliases": [{"ip": "1.2.3.4", "hostnames": ["a", "b"]}]}));
        assert_eq!(kernel_hostname(&p, "cluster.local"), "h.db.shop.svc.cluster.local");
        let ips = ["10.42.0.5", "fd42::5"].map(|ip| ip.parse().unwrap());
        let text = hosts(&p, &ips, "cluster.local", "");
        let both = "10.42.0.5\th.db.shop.svc.cluster.local\th\nfd42::5\th.db.shop.svc.cluster.local\th\n";
        assert!(text.contains(both), "{text}");
        assert!(text.ends_with("1.2.3.4\ta\tb\n"), "{text}");
        assert_eq!(kernel_hostname(&pod(json!({"containers": []})), "x"), "web-0");
    }
}
