//! Services in, upstream's messages out.

use serde_json::{Value, json};

use super::super::super::tests::{created, of, service as object, updated};
use super::super::super::{validate_create, validate_update};

fn messages(errors: Vec<crate::field::FieldError>) -> Vec<String> {
    errors.iter().map(ToString::to_string).collect()
}

fn on_create(spec: Value, annotations: Value) -> Vec<String> {
    let mut service = object(json!({"ports": [{"port": 80}]}));
    for (key, value) in spec.as_object().unwrap() {
        service["spec"][key] = value.clone();
    }
    service["metadata"]["annotations"] = annotations;
    let service = created(service);
    messages(validate_create(of(&service), &service))
}

/// A load balancer's spec with further fields.
fn balancer(mut spec: Value) -> Value {
    spec["type"] = json!("LoadBalancer");
    spec
}

fn each_has_one_mistake(rows: impl IntoIterator<Item = (Value, &'static str)>) {
    for (spec, expected) in rows {
        let found = on_create(spec.clone(), json!({}));
        assert!(found.len() == 1 && found[0].starts_with(expected), "{spec}: {found:#?}");
    }
}

#[test]
fn ports_and_addresses_of_new_services() {
    each_has_one_mistake([
        (
            balancer(json!({"ports": [{"port": 10250}]})),
            "spec.ports[0]: Invalid value: 10250: may not expose port 10250 externally since it is used by kubelet",
        ),
        (
            json!({"ports": [{"port": 80, "appProtocol": "a b"}]}),
            "spec.ports[0].appProtocol: Invalid value: \"a b\": name part",
        ),
        (
            json!({"type": "NodePort", "clusterIP": "None"}),
            "spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for NodePort services",
        ),
        (
            json!({"ports": [{"port": 80, "nodePort": 30080}]}),
            "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
        ),
        (
            json!({"loadBalancerSourceRanges": ["10.0.0.0/8"]}),
            "spec.LoadBalancerSourceRanges: Forbidden: may only be used when `type` is 'LoadBalancer'",
        ),
        (
            balancer(json!({"loadBalancerSourceRanges": [" 10.0.0.0/8", "x"]})),
            "spec.LoadBalancerSourceRanges[1]: Invalid value: \"x\": must be a valid CIDR value",
        ),
        (
            balancer(json!({"loadBalancerClass": "a/b/c"})),
            "spec.loadBalancerClass: Invalid value: \"a/b/c\": a qualified name",
        ),
        (
            json!({"loadBalancerClass": "a/b"}),
            "spec.loadBalancerClass: Forbidden: may only be used when `type` is 'LoadBalancer'",
        ),
    ]);
}

#[test]
fn policies_and_names_of_new_services() {
    each_has_one_mistake([
        (
            json!({"allocateLoadBalancerNodePorts": false}),
            "spec.allocateLoadBalancerNodePorts: Forbidden: may only be used when `type` is 'LoadBalancer'",
        ),
        (
            json!({"externalTrafficPolicy": "Local"}),
            "spec.externalTrafficPolicy: Invalid value: \"Local\": may only be set for externally-accessible services",
        ),
        (
            json!({"type": "NodePort", "externalTrafficPolicy": "Near"}),
            "spec.externalTrafficPolicy: Unsupported value: \"Near\": supported values: \"Cluster\", \"Local\"",
        ),
        (json!({"internalTrafficPolicy": "Near"}), "spec.internalTrafficPolicy: Unsupported value: \"Near\""),
        (
            json!({"trafficDistribution": "Near"}),
            "spec.trafficDistribution: Unsupported value: \"Near\": supported values: \"PreferClose\", \"PreferSameNode\", \"PreferSameZone\"",
        ),
        (
            json!({"healthCheckNodePort": 30001}),
            "spec.healthCheckNodePort: Invalid value: 30001: may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'",
        ),
        (
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}}}),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 86401: must be greater than 0 and less than 86400",
        ),
        (
            json!({"externalIPs": ["127.0.0.1"]}),
            "spec.externalIPs[0]: Invalid value: \"127.0.0.1\": may not be in the loopback range",
        ),
        (
            json!({"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.2"]}),
            "spec.clusterIPs: Invalid value: [\"10.0.0.2\"]: first value must match `clusterIP`",
        ),
        (
            json!({"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "10.0.0.2"]}),
            "spec.clusterIPs: Invalid value: [\"10.0.0.1\",\"10.0.0.2\"]: may specify no more than one IP for each IP family",
        ),
        (json!({"ipFamilies": ["IPv4", "IPv4"]}), "spec.ipFamilies[1]: Duplicate value: \"IPv4\""),
        (
            json!({"type": "ExternalName", "externalName": "a.example", "ipFamilies": ["IPv4"]}),
            "spec.ipFamilies: Forbidden: may not be set for ExternalName services",
        ),
        (
            json!({"ports": [{"name": "a", "port": 80}, {"name": "b", "port": 80}]}),
            "spec.ports[1]: Duplicate value: {\"port\":80,\"protocol\":\"TCP\"}",
        ),
    ]);
}

#[test]
fn annotations_of_new_services() {
    let ranges = json!({"service.beta.kubernetes.io/load-balancer-source-ranges": "10.0.0.0/8, x"});
    let found = on_create(json!({"type": "LoadBalancer"}), ranges.clone());
    assert!(found.len() == 1 && found[0].contains("\"x\": must be a valid CIDR value"), "{found:#?}");
    let found = on_create(json!({}), ranges);
    assert!(
        found.len() == 1 && found[0].ends_with("may only be used when `type` is 'LoadBalancer'"),
        "{found:#?}"
    );
    let modes = json!({"service.kubernetes.io/topology-mode": "Auto", "service.kubernetes.io/topology-aware-hints": "x"});
    let found = on_create(json!({}), modes);
    assert!(found.len() == 1 && found[0].contains("must match annotations["), "{found:#?}");
}

#[test]
fn changed_services() {
    let dual = json!({"type": "ClusterIP", "ports": [{"port": 80}], "clusterIP": "10.0.0.5",
        "clusterIPs": ["10.0.0.5", "fd00::5"], "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack"});
    let old = created(object(dual));
    let rows = [
        (
            json!({"clusterIP": "10.0.0.6", "clusterIPs": ["10.0.0.6", "fd00::5"]}),
            vec!["spec.clusterIPs[0]: Invalid value: [\"10.0.0.6\",\"fd00::5\"]: may not change once set"],
        ),
        (
            json!({"clusterIPs": ["10.0.0.5", "fd00::6"]}),
            vec!["spec.clusterIPs[1]: Invalid value: [\"10.0.0.5\",\"fd00::6\"]: may not change once set"],
        ),
        (
            json!({"clusterIPs": ["10.0.0.5"]}),
            vec![
                "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": must be set to 'SingleStack' when releasing the secondary clusterIP",
            ],
        ),
        (
            json!({"clusterIPs": ["10.0.0.5"], "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack"}),
            vec![],
        ),
        (
            json!({"clusterIP": "None", "clusterIPs": ["None"], "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack"}),
            vec!["spec.clusterIPs[0]: Invalid value: [\"None\"]: may not change once set"],
        ),
        (json!({"trafficDistribution": "PreferSameNode", "internalTrafficPolicy": "Local"}), vec![]),
    ];
    for (change, expected) in rows {
        let mut new = old.clone();
        for (key, value) in change.as_object().unwrap() {
            new["spec"][key] = value.clone();
        }
        let new = updated(None, new, &old);
        assert_eq!(messages(validate_update(of(&new), None, &new, &old)), expected, "{change}");
    }
    // Who knows the first address alone, and takes it away, takes all away.
    let mut new = old.clone();
    new["spec"]["clusterIPs"].take();
    assert_eq!(updated(None, new, &old)["spec"]["clusterIPs"], old["spec"]["clusterIPs"]);
}
