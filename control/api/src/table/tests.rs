//! Cells as upstream's printers make them.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::*;
use crate::kinds;

fn kind(api_version: &str, name: &str) -> &'static Kind {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    kinds::by_gvk(group, version, name).unwrap()
}

fn now() -> Timestamp {
    "2026-01-02T00:00:00Z".parse().unwrap()
}

fn cells_of(api_version: &str, name: &str, object: Value) -> Vec<Value> {
    let mut object = object;
    object["metadata"]["name"] = "x".into();
    object["metadata"]["creationTimestamp"] = "2026-01-01T23:59:00Z".into();
    let cells = row(kind(api_version, name), &object, now());
    assert_eq!(cells.len(), columns(kind(api_version, name)).len());
    cells
}

#[test]
fn durations_read_as_upstreams() {
    let cases = [
        (-3, "<invalid>", "<invalid>"),
        (-1, "0s", "0s"),
        (0, "0s", "0s"),
        (59, "59s", "59s"),
        (60, "60s", "1m"),
        (119, "119s", "1m"),
        (120, "2m", "2m"),
        (185, "3m5s", "3m"),
        (600, "10m", "10m"),
        (3 * 3600 - 1, "179m", "2h"),
        (3 * 3600, "3h", "3h"),
        (3 * 3600 + 60, "3h1m", "3h"),
        (8 * 3600, "8h", "8h"),
        (47 * 3600, "47h", "1d"),
        (48 * 3600, "2d", "2d"),
        (50 * 3600, "2d2h", "2d"),
        (8 * 86400, "8d", "8d"),
        (729 * 86400, "729d", "1y"),
        (730 * 86400, "2y", "2y"),
        (732 * 86400, "2y2d", "2y"),
        (8 * 365 * 86400, "8y", "8y"),
    ];
    for (seconds, long, short) in cases {
        let duration = SignedDuration::from_secs(seconds);
        assert_eq!(human_duration(duration), long, "{seconds}");
        assert_eq!(short_human_duration(duration), short, "{seconds}");
    }
}

#[test]
fn pod_states() {
    let running = json!({"name": "c", "ready": true, "state": {"running": {}}});
    let waiting = |reason: &str| json!({"name": "c", "state": {"waiting": {"reason": reason}}});
    let ended = |code: i64, reason: &str| json!({"name": "c", "state": {"terminated": {"exitCode": code, "reason": reason}}});
    let init = |status: Value| {
        json!({
            "spec": {"initContainers": [{"name": "c"}, {"name": "d"}], "containers": [{"name": "e"}]},
            "status": {"phase": "Pending", "initContainerStatuses": [status]},
        })
    };
    let one = |phase: &str, status: Value| json!({"spec": {"containers": [{"name": "c"}]}, "status": {"phase": phase, "containerStatuses": [status]}});
    let mut deleted = one("Running", running.clone());
    deleted["metadata"]["deletionTimestamp"] = "2026-01-02T00:00:00Z".into();
    let mut restarted = one("Running", waiting("CrashLoopBackOff"));
    restarted["status"]["containerStatuses"][0]["restartCount"] = 3.into();
    restarted["status"]["containerStatuses"][0]["lastState"] =
        json!({"terminated": {"exitCode": 1, "finishedAt": "2026-01-01T23:55:00Z"}});
    let cases = [
        (one("Running", running.clone()), ["1/1", "Running", "0"]),
        (one("Pending", waiting("ContainerCreating")), ["0/1", "ContainerCreating", "0"]),
        (restarted, ["0/1", "CrashLoopBackOff", "3 (5m ago)"]),
        (one("Succeeded", ended(0, "Completed")), ["0/1", "Completed", "0"]),
        (one("Failed", ended(2, "")), ["0/1", "ExitCode:2", "0"]),
        (deleted, ["1/1", "Terminating", "0"]),
        (init(json!({"name": "c", "state": {"running": {}}})), ["0/1", "Init:0/2", "0"]),
        (init(waiting("PodInitializing")), ["0/1", "Init:0/2", "0"]),
        (init(waiting("ImagePullBackOff")), ["0/1", "Init:ImagePullBackOff", "0"]),
        (init(ended(1, "Error")), ["0/1", "Init:Error", "0"]),
        (
            json!({"spec": {"containers": [{"name": "c"}]}, "status": {"phase": "Pending", "conditions": [
                {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"},
            ]}}),
            ["0/1", "SchedulingGated", "0"],
        ),
        (
            json!({"spec": {"containers": [{"name": "c"}, {"name": "d"}]}, "status": {
                "phase": "Running", "conditions": [{"type": "Ready", "status": "False"}],
                "containerStatuses": [ended(0, "Completed"), {"name": "d", "ready": true, "state": {"running": {}}}],
            }}),
            ["1/2", "NotReady", "0"],
        ),
        (json!({"status": {"phase": "Failed", "reason": "Evicted"}}), ["0/0", "Evicted", "0"]),
    ];
    for (pod, expected) in cases {
        let cells = cells_of("v1", "Pod", pod.clone());
        assert_eq!(cells[1..4], expected.map(Value::from), "{pod}");
    }
}

#[test]
fn pod_wide_columns_and_conditions() {
    let pod = json!({
        "spec": {"nodeName": "n1", "readinessGates": [{"conditionType": "a/b"}]},
        "status": {"phase": "Succeeded", "podIPs": [{"ip": "10.42.0.3"}], "conditions": [{"type": "a/b", "status": "True"}]},
    });
    let cells = cells_of("v1", "Pod", pod.clone());
    assert_eq!(cells[4..], ["60s", "10.42.0.3", "n1", "<none>", "1/1"].map(Value::from));
    assert_eq!(conditions(kind("v1", "Pod"), &pod)[0]["reason"], "Succeeded");
    let names: Vec<_> =
        columns(kind("v1", "Pod")).iter().map(|column| (column.name, column.priority)).collect();
    assert_eq!(names[..3], [("Name", 0), ("Ready", 0), ("Status", 0)]);
    assert_eq!(names[5..], [("IP", 1), ("Node", 1), ("Nominated Node", 1), ("Readiness Gates", 1)]);
}

fn template() -> Value {
    json!({"spec": {"containers": [{"name": "a", "image": "nginx:1"}, {"name": "b", "image": "busybox"}]}})
}

#[test]
fn workloads() {
    let selector = json!({
        "matchLabels": {"b": "2", "a": "1"},
        "matchExpressions": [{"key": "c", "operator": "In", "values": ["y", "x"]}, {"key": "d", "operator": "DoesNotExist"}],
    });
    let spec = json!({"replicas": 3, "selector": selector, "template": template()});
    let status = json!({"replicas": 3, "readyReplicas": 2, "updatedReplicas": 1, "availableReplicas": 2});
    let tail = [json!("60s"), json!("a,b"), json!("nginx:1,busybox"), json!("a=1,b=2,c in (x,y),!d")];
    let cells = cells_of("apps/v1", "Deployment", json!({"spec": spec, "status": status}));
    assert_eq!(cells[..4], [json!("x"), json!("2/3"), json!(1), json!(2)]);
    assert_eq!(cells[4..], tail);
    let cells = cells_of("apps/v1", "ReplicaSet", json!({"spec": spec, "status": status}));
    assert_eq!(cells[..4], [json!("x"), json!(3), json!(3), json!(2)]);
    assert_eq!(cells[4..], tail);
    let cells = cells_of("apps/v1", "StatefulSet", json!({"spec": spec, "status": status}));
    assert_eq!(cells, [json!("x"), json!("2/3"), json!("60s"), json!("a,b"), json!("nginx:1,busybox")]);
    let job = json!({
        "spec": {"completions": 2, "template": template()},
        "status": {
            "succeeded": 2, "startTime": "2026-01-01T23:00:00Z", "completionTime": "2026-01-01T23:00:30Z",
            "conditions": [{"type": "Complete", "status": "True"}],
        },
    });
    assert_eq!(cells_of("batch/v1", "Job", job)[1..4], ["Complete", "2/2", "30s"].map(Value::from));
    let cron = json!({"spec": {"schedule": "* * * * *", "suspend": false}, "status": {"active": [{}]}});
    let expected = [json!("* * * * *"), json!("<none>"), json!("False"), json!(1), json!("<none>")];
    assert_eq!(cells_of("batch/v1", "CronJob", cron)[1..6], expected);
    let hpa = json!({
        "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "d"}, "minReplicas": 1, "maxReplicas": 5, "metrics": [
            {"type": "Resource", "resource": {"name": "cpu", "target": {"averageUtilization": 80}}},
        ]},
        "status": {"currentReplicas": 2},
    });
    let expected = [json!("Deployment/d"), json!("cpu: <unknown>/80%"), json!("1"), json!(5), json!(2)];
    assert_eq!(cells_of("autoscaling/v2", "HorizontalPodAutoscaler", hpa)[1..6], expected);
}

#[test]
fn services_and_endpoints() {
    let service = |spec: Value, status: Value| {
        cells_of("v1", "Service", json!({"spec": spec, "status": status}))[1..5].to_vec()
    };
    let port = json!([{"port": 80, "protocol": "TCP", "nodePort": 30080}, {"port": 53, "protocol": "UDP"}]);
    let balancer = json!({"loadBalancer": {"ingress": [{"ip": "2.2.2.2"}, {"hostname": "a.example"}]}});
    let cases = [
        (
            json!({"type": "ClusterIP", "clusterIPs": ["10.43.0.1"]}),
            json!({}),
            ["ClusterIP", "10.43.0.1", "<none>", "<none>"],
        ),
        (
            json!({"type": "NodePort", "clusterIPs": ["10.43.0.1"], "ports": port, "externalIPs": ["1.1.1.1"]}),
            json!({}),
            ["NodePort", "10.43.0.1", "1.1.1.1", "80:30080/TCP,53/UDP"],
        ),
        (
            json!({"type": "LoadBalancer", "clusterIPs": ["10.43.0.1"]}),
            json!({}),
            ["LoadBalancer", "10.43.0.1", "<pending>", "<none>"],
        ),
        (
            json!({"type": "LoadBalancer", "clusterIPs": ["10.43.0.1"], "externalIPs": ["1.1.1.1"]}),
            balancer,
            ["LoadBalancer", "10.43.0.1", "2.2.2.2,a.example,1.1.1.1", "<none>"],
        ),
        (
            json!({"type": "ExternalName", "externalName": "example.com"}),
            json!({}),
            ["ExternalName", "<none>", "example.com", "<none>"],
        ),
    ];
    for (spec, status, expected) in cases {
        assert_eq!(service(spec, status), expected.map(Value::from));
    }
    let addresses = json!([{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}, {"ip": "fd00::1"}, {"ip": "10.0.0.4"}]);
    let endpoints = json!({"subsets": [{"addresses": addresses, "ports": [{"port": 80}]}]});
    assert_eq!(cells_of("v1", "Endpoints", endpoints)[1], "10.0.0.1:80,10.0.0.2:80,[fd00::1]:80 + 1 more...");
    assert_eq!(cells_of("v1", "Endpoints", json!({}))[1], "<none>");
    let slice = json!({"addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"]}]});
    let cells = cells_of("discovery.k8s.io/v1", "EndpointSlice", slice);
    assert_eq!(cells[1..4], ["IPv4", "<unset>", "10.0.0.1"].map(Value::from));
}

#[test]
fn nodes_and_events() {
    let node = json!({
        "metadata": {"labels": {"node-role.kubernetes.io/control-plane": "", "kubernetes.io/role": "edge"}},
        "spec": {"unschedulable": true},
        "status": {
            "conditions": [{"type": "Ready", "status": "True"}],
            "addresses": [{"type": "InternalIP", "address": "192.168.0.2"}],
            "nodeInfo": {"kubeletVersion": "v1.36.0", "osImage": "Debian"},
        },
    });
    let cells = cells_of("v1", "Node", node);
    assert_eq!(cells[1..3], ["Ready,SchedulingDisabled", "control-plane,edge"].map(Value::from));
    assert_eq!(
        cells[4..],
        ["v1.36.0", "192.168.0.2", "<none>", "Debian", "<unknown>", "<unknown>"].map(Value::from)
    );

    let old = json!({
        "involvedObject": {"kind": "Pod", "name": "p", "fieldPath": "spec.containers{c}"}, "type": "Normal", "reason": "Pulled",
        "source": {"component": "kubelet", "host": "n1"}, "message": " hi\n",
        "firstTimestamp": "2026-01-01T23:50:00Z", "lastTimestamp": "2026-01-01T23:58:00Z", "count": 3,
    });
    let expected = [
        json!("2m"),
        json!("Normal"),
        json!("Pulled"),
        json!("pod/p"),
        json!("spec.containers{c}"),
        json!("kubelet, n1"),
        json!("hi"),
        json!("10m"),
        json!(3),
        json!("x"),
    ];
    assert_eq!(cells_of("v1", "Event", old), expected);
    let new = json!({
        "regarding": {"kind": "Node"}, "eventTime": "2026-01-01T23:59:30.000000Z", "note": "n",
        "reportingController": "c", "reportingInstance": "i", "series": {"count": 5, "lastObservedTime": "2026-01-01T23:59:50.5Z"},
    });
    let cells = cells_of("events.k8s.io/v1", "Event", new);
    assert_eq!((&cells[0], &cells[3], &cells[5]), (&json!("9s"), &json!("node"), &json!("c, i")));
    assert_eq!((&cells[7], &cells[8]), (&json!("30s"), &json!(5)));
}

#[test]
fn small_kinds() {
    let cases = [
        ("v1", "Namespace", json!({"status": {"phase": "Active"}}), json!(["x", "Active", "60s"])),
        ("v1", "ConfigMap", json!({"data": {"a": ""}, "binaryData": {"b": ""}}), json!(["x", 2, "60s"])),
        ("v1", "Secret", json!({"type": "Opaque", "data": {"a": ""}}), json!(["x", "Opaque", 1, "60s"])),
        ("v1", "ServiceAccount", json!({}), json!(["x", 0, "60s"])),
        (
            "coordination.k8s.io/v1",
            "Lease",
            json!({"spec": {"holderIdentity": "h"}}),
            json!(["x", "h", "60s"]),
        ),
        ("rbac.authorization.k8s.io/v1", "ClusterRole", json!({}), json!(["x", "2026-01-01T23:59:00Z"])),
        (
            "rbac.authorization.k8s.io/v1",
            "RoleBinding",
            json!({
                "roleRef": {"kind": "Role", "name": "r"},
                "subjects": [{"kind": "User", "name": "u"}, {"kind": "ServiceAccount", "name": "s", "namespace": "n"}],
            }),
            json!(["x", "Role/r", "60s", "u", "", "n/s"]),
        ),
        (
            "storage.k8s.io/v1",
            "StorageClass",
            json!({
                "metadata": {"annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
                "provisioner": "p", "reclaimPolicy": "Retain",
            }),
            json!(["x (default)", "p", "Retain", "Immediate", false, "60s"]),
        ),
        (
            "v1",
            "PersistentVolumeClaim",
            json!({
                "spec": {"volumeName": "v", "storageClassName": "s", "volumeMode": "Filesystem"},
                "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany", "ReadWriteOnce"]},
            }),
            json!(["x", "Bound", "v", "1Gi", "RWO,RWX", "s", "<unset>", "60s", "Filesystem"]),
        ),
        (
            "networking.k8s.io/v1",
            "Ingress",
            json!({"spec": {"rules": [{"host": "a.example"}], "tls": [{}]}}),
            json!(["x", "<none>", "a.example", "", "80, 443", "60s"]),
        ),
        (
            "policy/v1",
            "PodDisruptionBudget",
            json!({"spec": {"minAvailable": "50%"}}),
            json!(["x", "50%", "N/A", 0, "60s"]),
        ),
        ("scheduling.k8s.io/v1", "PriorityClass", json!({"value": 5}), json!(["x", 5, false, "60s", ""])),
        (
            "apiregistration.k8s.io/v1",
            "APIService",
            json!({"status": {"conditions": [{"type": "Available", "status": "False", "reason": "Gone"}]}}),
            json!(["x", "Local", "False (Gone)", "60s"]),
        ),
        (
            "v1",
            "ResourceQuota",
            json!({"status": {"hard": {"pods": "10", "limits.cpu": "2"}, "used": {"pods": "1"}}}),
            json!(["x", "pods: 1/10", "limits.cpu: 0/2", "60s"]),
        ),
    ];
    for (api_version, name, object, expected) in cases {
        assert_eq!(Value::from(cells_of(api_version, name, object)), expected, "{name}");
    }
}

#[test]
fn every_kind_has_a_cell_for_each_column() {
    for kind in kinds::all() {
        assert_eq!(row(kind, &json!({}), now()).len(), columns(kind).len(), "{}/{}", kind.group, kind.kind);
        let headings = columns(kind).iter().filter(|column| column.format == "name").count();
        assert!(
            headings >= 1 || kind.kind == "StorageVersionMigration" || kind.kind == "Scale",
            "{}",
            kind.kind
        );
    }
}
