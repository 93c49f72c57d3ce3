use serde_json::json;

use super::*;
use crate::{Protocol, Rate};

fn good() -> Value {
    json!({
        "cniVersion": "1.1.0", "name": "weft", "type": "weft-cni", "bridge": "weft0", "mtu": 1450,
        "ipam": {"subnet": "10.42.1.0/24", "gateway": "10.42.1.1"}, "stateDir": "/run/weft/n/cni",
        "a-field": "of somebody else"
    })
}

fn read(value: &Value) -> Result<Config, ConfigError> {
    Config::read(value.to_string().as_bytes())
}

#[test]
fn reads_what_the_agent_writes() {
    let config = read(&good()).unwrap();
    let fabric = config.fabric.unwrap();
    assert_eq!(fabric.ipam.ranges[0].subnet.to_string(), "10.42.1.0/24");
    assert_eq!((fabric.bridge.as_str(), fabric.mtu_bytes), ("weft0", 1450));
}

#[test]
fn reads_a_range_of_each_family() {
    let v4 = json!({"subnet": "10.42.1.0/24", "gateway": "10.42.1.1"});
    let v6 = json!({"subnet": "fd00:42:0:1::/64", "gateway": "fd00:42:0:1::1"});
    let with = |ipam: Value| {
        let mut config = good();
        config["ipam"] = ipam;
        read(&config).map(|config| config.fabric.unwrap().ipam.ranges)
    };
    let one = read(&good()).unwrap().fabric.unwrap().ipam.ranges;
    assert_eq!(with(json!({"ranges": [v4]})).unwrap(), one);
    let both = with(json!({"ranges": [v6, v4]})).unwrap();
    assert_eq!(both.iter().map(|range| range.subnet.is_ipv6()).collect::<Vec<_>>(), [true, false]);
    assert_eq!(with(v6.clone()).unwrap(), [both[0]]);
    // As host-local is configured.
    let sets = json!({"type": "host-local", "ranges": [[{"subnet": "fd00:42:0:1::/64"}], [v4]]});
    assert_eq!(with(sets).unwrap(), both);
    assert_eq!(with(json!({"subnet": "10.42.1.0/24"})).unwrap(), one);
    for mistake in [
        json!({"ranges": []}),
        json!({"ranges": [v4, v4]}),
        json!({"ranges": [v4, v6, v4]}),
        json!({"ranges": [[]]}),
        json!({"ranges": [[v4, {"subnet": "10.42.2.0/24"}]]}),
        json!({"subnet": "10.42.1.0/24", "rangeStart": "10.42.1.20"}),
        json!({"subnet": "10.42.1.0/24", "rangeEnd": "10.42.1.20"}),
        json!({"ranges": [v6], "subnet": "10.42.1.0/24"}),
        json!({"subnet": "fd00::/127", "gateway": "fd00::1"}),
        json!({"subnet": "fd00::/64", "gateway": "fd00::"}),
        json!({"subnet": "fd00::/64", "gateway": "10.42.1.1"}),
    ] {
        assert_eq!(with(mistake.clone()).unwrap_err().code(), Code::InvalidConfig, "{mistake}");
    }
    let mut narrow = good();
    (narrow["ipam"], narrow["mtu"]) = (v6, json!(1279));
    assert_eq!(read(&narrow).unwrap_err().code(), Code::InvalidConfig);
}

#[test]
fn without_a_fabric_it_is_used_behind_another_plugin() {
    let mut config = good();
    for field in ["bridge", "mtu", "ipam"] {
        config.as_object_mut().unwrap().remove(field);
        let chained = read(&config).map(|config| config.fabric.is_none());
        assert_eq!(chained.is_ok(), field == "ipam", "{field}");
    }
}

#[test]
fn reads_the_capabilities() {
    let with = |runtime: Value| {
        let mut config = good();
        config["runtimeConfig"] = runtime;
        read(&config)
    };
    let config = with(json!({
        "portMappings": [
            {"hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": ""},
            {"hostPort": 0, "containerPort": 81, "protocol": "tcp"},
            {"hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": "127.0.0.1"},
        ],
        "bandwidth": {"ingressRate": 1000000, "ingressBurst": 8000, "egressRate": 2000000},
        "mac": "02:00:00:00:00:01",
        "dns": {"servers": ["10.43.0.10"], "searches": ["a.b"], "options": ["ndots:5"]},
    }));
    let config = config.unwrap();
    let ports: Vec<_> = config.runtime.ports.iter().map(|one| (one.host_port, one.protocol)).collect();
    assert_eq!(ports, [(8080, Protocol::Tcp), (53, Protocol::Udp)]);
    assert_eq!(config.runtime.ports[1].host_ip, "127.0.0.1".parse().ok());
    let rate = Rate { bits_per_second: 1_000_000, burst_bits: Some(8000) };
    assert_eq!(config.runtime.bandwidth.ingress, Some(rate));
    assert_eq!(config.runtime.bandwidth.egress.unwrap().burst_bits, None);
    assert_eq!(config.dns.nameservers, ["10.43.0.10"]);
    for (runtime, code) in [
        (json!({"portMappings": [{"hostPort": 70000, "containerPort": 80}]}), Code::InvalidConfig),
        (json!({"portMappings": [{"hostPort": 80, "containerPort": 0}]}), Code::InvalidConfig),
        (
            json!({"portMappings": [{"hostPort": 80, "containerPort": 80, "protocol": "x"}]}),
            Code::InvalidConfig,
        ),
        (
            json!({"portMappings": [{"hostPort": 80, "containerPort": 80, "hostIP": "x"}]}),
            Code::InvalidConfig,
        ),
        (json!({"portMappings": [{"hostPort": -1, "containerPort": 80}]}), Code::Decode),
        (json!({"bandwidth": {"egressBurst": 1}}), Code::InvalidConfig),
        (json!({"mac": "01:00:5e:00:00:01"}), Code::Decode),
    ] {
        assert_eq!(with(runtime.clone()).unwrap_err().code(), code, "{runtime}");
    }
}

#[test]
fn each_mistake_has_its_code() {
    assert_eq!(Config::read(b"{not json").unwrap_err().code(), Code::Decode);
    assert_eq!(Config::read(b"[]").unwrap_err().code(), Code::Decode);
    let with = |pointer: &str, value: Value| {
        let mut config = good();
        config["prevResult"] = json!({});
        *config.pointer_mut(pointer).unwrap() = value;
        read(&config).unwrap_err().code()
    };
    assert_eq!(with("/cniVersion", json!("2.0.0")), Code::IncompatibleVersion);
    assert_eq!(with("/cniVersion", Value::Null), Code::IncompatibleVersion);
    assert_eq!(with("/mtu", json!("big")), Code::Decode);
    for (pointer, value) in [
        ("/name", json!("../x")),
        ("/name", Value::Null),
        ("/bridge", json!("")),
        ("/mtu", json!(100)),
        ("/ipam", Value::Null),
        ("/ipam/subnet", json!("10.42.1.5/24")),
        ("/ipam/subnet", json!("10.42.1.0/31")),
        ("/ipam/gateway", json!("10.42.2.1")),
        ("/ipam/gateway", json!("10.42.1.255")),
        ("/stateDir", json!("relative")),
        ("/prevResult", json!("text")),
        ("/prevResult", json!([1])),
    ] {
        assert_eq!(with(pointer, value.clone()), Code::InvalidConfig, "{pointer} {value}");
    }
}
