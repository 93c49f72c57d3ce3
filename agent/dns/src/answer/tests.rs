//! Questions and their answers, row by row.

use super::*;
use crate::index::Slice;

fn index() -> Index {
    let mut index = Index::default();
    index.set_services_listed();
    index.set_slices_listed();
    let port = |name: &str, port| Port { name: name.to_owned(), protocol: "tcp".to_owned(), port };
    let service = |target, ports, publish_not_ready| Service { target, ports, publish_not_ready };
    let addresses = Target::Addresses(vec!["10.43.0.7".parse().unwrap()]);
    index.put_service("default", "web", service(addresses, vec![port("http", 80)], false));
    index.put_service("default", "db", service(Target::Endpoints, vec![port("sql", 5432)], false));
    index.put_service("default", "all", service(Target::Endpoints, Vec::new(), true));
    index.put_service("default", "none", service(Target::Endpoints, Vec::new(), false));
    index.put_service("default", "out", service(Target::Alias("example.org".to_owned()), Vec::new(), false));
    let endpoint = |address: &str, hostname: Option<&str>, ready| Endpoint {
        address: address.parse().unwrap(),
        hostname: hostname.map(str::to_owned),
        ready,
    };
    let endpoints = vec![
        endpoint("10.42.0.5", Some("db-0"), true),
        endpoint("10.42.1.6", None, true),
        endpoint("10.42.1.7", None, false),
    ];
    let slice = |service: &str| Slice {
        service: service.to_owned(),
        endpoints: endpoints.clone(),
        ports: vec![port("sql", 5433)],
    };
    index.put_slice("default", "db-x", slice("db"));
    index.put_slice("default", "all-x", slice("all"));
    dual_stack(&mut index);
    index
}

/// Services of both families, and of IPv6 alone.
fn dual_stack(index: &mut Index) {
    let port = Port { name: "http".to_owned(), protocol: "tcp".to_owned(), port: 80 };
    let service = |target| Service { target, ports: vec![port.clone()], publish_not_ready: false };
    let addresses = |list: &[&str]| Target::Addresses(list.iter().map(|a| a.parse().unwrap()).collect());
    index.put_service("default", "both", service(addresses(&["10.43.0.8", "fd43::8"])));
    index.put_service("default", "six", service(addresses(&["fd43::9"])));
    index.put_service("default", "pair", service(Target::Endpoints));
    for (name, list) in
        [("pair-4", ["10.42.2.5", "10.42.2.6"]), ("pair-6", ["fd42:0:0:2::5", "fd42:0:0:2::6"])]
    {
        let endpoints = list.into_iter().zip([Some("pair-0"), None]).map(|(address, hostname)| Endpoint {
            address: address.parse().unwrap(),
            hostname: hostname.map(str::to_owned),
            ready: true,
        });
        let endpoints = endpoints.collect();
        index.put_slice(
            "default",
            name,
            Slice { service: "pair".to_owned(), endpoints, ports: vec![port.clone()] },
        );
    }
}

/// The answer in one line: record data joined by commas, or what else was decided.
fn ask(index: &Index, name: &str, kind: RecordType) -> String {
    let zone = Zone::new("cluster.local").unwrap();
    match zone.answer(index, &Name::from_ascii(name).unwrap(), kind) {
        Answer::Records(records) => {
            records.iter().map(|record| record.data.to_string()).collect::<Vec<_>>().join(", ")
        }
        Answer::Alias(_, target) => format!("alias {target}"),
        Answer::NoSuchName => "no such name".to_owned(),
        Answer::Elsewhere => "elsewhere".to_owned(),
        Answer::NotReady => "not ready".to_owned(),
    }
}

#[test]
fn names_of_the_cluster() {
    use RecordType::{A, AAAA, PTR, SRV, TXT};
    let rows = [
        ("web.default.svc.cluster.local.", A, "10.43.0.7"),
        ("WEB.Default.SVC.cluster.LOCAL.", A, "10.43.0.7"),
        ("web.default.svc.cluster.local.", AAAA, ""),
        ("web.other.svc.cluster.local.", A, "no such name"),
        ("db.default.svc.cluster.local.", A, "10.42.0.5, 10.42.1.6"),
        ("all.default.svc.cluster.local.", A, "10.42.0.5, 10.42.1.6, 10.42.1.7"),
        ("none.default.svc.cluster.local.", A, "no such name"),
        ("out.default.svc.cluster.local.", A, "alias example.org."),
        ("db-0.db.default.svc.cluster.local.", A, "10.42.0.5"),
        ("10-42-1-6.db.default.svc.cluster.local.", A, "10.42.1.6"),
        ("10-42-1-7.db.default.svc.cluster.local.", A, "no such name"),
        ("db-0.web.default.svc.cluster.local.", A, "no such name"),
        ("_http._tcp.web.default.svc.cluster.local.", SRV, "0 100 80 web.default.svc.cluster.local."),
        ("_http._tcp.web.default.svc.cluster.local.", A, ""),
        ("_http._udp.web.default.svc.cluster.local.", SRV, "no such name"),
        (
            "_sql._tcp.db.default.svc.cluster.local.",
            SRV,
            "0 50 5433 db-0.db.default.svc.cluster.local., 0 50 5433 10-42-1-6.db.default.svc.cluster.local.",
        ),
        ("_tcp.web.default.svc.cluster.local.", A, ""),
        ("default.svc.cluster.local.", A, ""),
        ("other.svc.cluster.local.", A, "no such name"),
        ("cluster.local.", A, ""),
        ("*.cluster.local.", A, "no such name"),
        ("10-42-0-9.default.pod.cluster.local.", A, "10.42.0.9"),
        ("name.default.pod.cluster.local.", A, "no such name"),
        ("dns-version.cluster.local.", TXT, "1.1.0"),
        ("7.0.43.10.in-addr.arpa.", PTR, "web.default.svc.cluster.local."),
        (
            "5.0.42.10.in-addr.arpa.",
            PTR,
            "db-0.db.default.svc.cluster.local., db-0.all.default.svc.cluster.local.",
        ),
        ("9.0.42.10.in-addr.arpa.", PTR, "elsewhere"),
        ("example.org.", A, "elsewhere"),
    ];
    let index = index();
    for (name, kind, expected) in rows {
        assert_eq!(ask(&index, name, kind), expected, "{name} {kind}");
    }
}

#[test]
fn names_of_both_families() {
    use RecordType::{A, AAAA, PTR, SRV};
    let reverse = |host: &str| {
        let octets = host.parse::<std::net::Ipv6Addr>().unwrap().octets();
        let nibbles = octets.iter().rev().flat_map(|byte| [byte & 15, byte >> 4]);
        nibbles.map(|nibble| format!("{nibble:x}.")).collect::<String>() + "ip6.arpa."
    };
    let (service, endpoint, other) = (reverse("fd43::8"), reverse("fd42:0:0:2::5"), reverse("fd42:0:0:2::7"));
    let rows = [
        ("both.default.svc.cluster.local.", A, "10.43.0.8"),
        ("both.default.svc.cluster.local.", AAAA, "fd43::8"),
        ("six.default.svc.cluster.local.", A, ""),
        ("six.default.svc.cluster.local.", AAAA, "fd43::9"),
        ("pair.default.svc.cluster.local.", A, "10.42.2.5, 10.42.2.6"),
        ("pair.default.svc.cluster.local.", AAAA, "fd42:0:0:2::5, fd42:0:0:2::6"),
        ("pair-0.pair.default.svc.cluster.local.", A, "10.42.2.5"),
        ("pair-0.pair.default.svc.cluster.local.", AAAA, "fd42:0:0:2::5"),
        ("fd42-0-0-2--6.pair.default.svc.cluster.local.", AAAA, "fd42:0:0:2::6"),
        ("fd42-0-0-2--6.pair.default.svc.cluster.local.", A, ""),
        (
            "_http._tcp.pair.default.svc.cluster.local.",
            SRV,
            "0 33 80 pair-0.pair.default.svc.cluster.local., 0 33 80 10-42-2-6.pair.default.svc.cluster.local., \
             0 33 80 fd42-0-0-2--6.pair.default.svc.cluster.local.",
        ),
        ("fd42--7.default.pod.cluster.local.", AAAA, "fd42::7"),
        ("fd42--7.default.pod.cluster.local.", A, ""),
        (service.as_str(), PTR, "both.default.svc.cluster.local."),
        (endpoint.as_str(), PTR, "pair-0.pair.default.svc.cluster.local."),
        (other.as_str(), PTR, "elsewhere"),
    ];
    let index = index();
    for (name, kind, expected) in rows {
        assert_eq!(ask(&index, name, kind), expected, "{name} {kind}");
    }
}

#[test]
fn until_the_lists_are_in_nothing_is_denied() {
    let index = Index::default();
    assert_eq!(ask(&index, "web.default.svc.cluster.local.", RecordType::A), "not ready");
    assert_eq!(ask(&index, "example.org.", RecordType::A), "elsewhere");
}

#[test]
fn what_is_removed_is_forgotten() {
    let mut index = index();
    index.remove_slice("default", "db-x");
    assert_eq!(ask(&index, "db.default.svc.cluster.local.", RecordType::A), "no such name");
    index.remove_slice("default", "all-x");
    assert_eq!(ask(&index, "5.0.42.10.in-addr.arpa.", RecordType::PTR), "elsewhere");
    index.remove_service("default", "web");
    assert_eq!(ask(&index, "7.0.43.10.in-addr.arpa.", RecordType::PTR), "elsewhere");
}
