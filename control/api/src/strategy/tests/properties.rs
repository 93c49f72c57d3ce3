//! What holds for any object: nothing panics, defaults settle at once, an object updated to itself does not change.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::super::*;
use super::{context, kind};
use crate::kinds;
use crate::table;

/// Fields that some rule looks at.
const FIELDS: &[&str] = &[
    "spec",
    "status",
    "metadata",
    "labels",
    "annotations",
    "finalizers",
    "ownerReferences",
    "name",
    "namespace",
    "template",
    "jobTemplate",
    "containers",
    "initContainers",
    "ephemeralContainers",
    "volumes",
    "volumeMounts",
    "emptyDir",
    "hostPath",
    "projected",
    "sources",
    "secret",
    "configMap",
    "downwardAPI",
    "items",
    "fieldRef",
    "env",
    "valueFrom",
    "ports",
    "resources",
    "limits",
    "requests",
    "cpu",
    "memory",
    "livenessProbe",
    "httpGet",
    "port",
    "selector",
    "matchLabels",
    "matchExpressions",
    "key",
    "operator",
    "values",
    "strategy",
    "rollingUpdate",
    "updateStrategy",
    "type",
    "replicas",
    "sessionAffinity",
    "clusterIP",
    "clusterIPs",
    "rules",
    "subjects",
    "roleRef",
    "webhooks",
    "versions",
    "names",
    "kind",
    "data",
    "stringData",
    "subsets",
    "addresses",
    "endpoints",
    "tolerations",
    "affinity",
    "nodeAffinity",
    "requiredDuringSchedulingIgnoredDuringExecution",
    "nodeSelectorTerms",
    "topologySpreadConstraints",
    "conditions",
    "containerStatuses",
    "state",
    "terminated",
    "metrics",
    "resource",
    "target",
    "behavior",
    "hostNetwork",
    "securityContext",
    "ingress",
    "egress",
    "volumeClaimTemplates",
    "limited",
    "limitResponse",
    "queuing",
    "serviceAccount",
    "restartPolicy",
    "completions",
    "parallelism",
    "capacity",
    "accessModes",
    "claimRef",
    "default",
    "max",
    "limitsRange",
    "taints",
    "podCIDRs",
    "overhead",
    "dnsConfig",
    "schedulingGates",
    "generation",
];

fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        prop_oneof![Just(0_i64), Just(1), Just(80), any::<i64>()].prop_map(Value::from),
        prop_oneof![
            Just(""),
            Just("a"),
            Just("Always"),
            Just("ClientIP"),
            Just("Container"),
            Just("RollingUpdate"),
            Just("OnFailure"),
            Just("Localhost"),
            Just("LoadBalancer"),
            Just("100m"),
            Just("1.5Gi"),
            Just("0.00001"),
            Just("metadata.labels['x']"),
            Just("10.0.0.1"),
            Just("None"),
            Just("In"),
            Just("é/\u{0}'"),
            Just("2026-01-01T00:00:00Z"),
            Just("50%"),
        ]
        .prop_map(Value::from),
    ]
}

fn tree() -> impl Strategy<Value = Value> {
    leaf().prop_recursive(7, 96, 6, |inner| {
        prop_oneof![
            1 => proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            3 => proptest::collection::vec((proptest::sample::select(FIELDS), inner), 0..6).prop_map(|fields| {
                fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>().into()
            }),
        ]
    })
}

fn object() -> impl Strategy<Value = Value> {
    (tree(), tree(), tree()).prop_map(|(rest, spec, metadata)| {
        let mut object = if rest.is_object() { rest } else { json!({}) };
        object["spec"] = spec;
        object["metadata"] = metadata;
        object
    })
}

fn each_way(kind: &Kind, old: &Value, new: &Value) {
    for subresource in [
        None,
        Some("status"),
        Some("scale"),
        Some("finalize"),
        Some("approval"),
        Some("resize"),
        Some("ephemeralcontainers"),
    ] {
        let mut new = new.clone();
        prepare_update(kind, subresource, &mut new, old);
        validate_update(kind, subresource, &new, old);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_object_is_handled_and_defaults_settle(one in object(), other in object()) {
        for kind in kinds::all() {
            let mut old = one.clone();
            default(kind, &mut old);
            let mut again = old.clone();
            default(kind, &mut again);
            prop_assert_eq!(&old, &again, "{}", kind.kind);
            prepare_create(kind, &mut old, &context());
            validate_create(kind, &old);
            each_way(kind, &old, &other);
            selectable_fields(kind, &old);
            warnings(kind, &old);
            scale_set(kind, &mut again, &scale_get(kind, &old));
            prop_assert_eq!(table::row(kind, &old, context().now).len(), table::columns(kind).len(), "{}", kind.kind);
        }
    }

    #[test]
    fn an_object_updated_to_itself_keeps_its_generation(one in object()) {
        let kind = kind("apps/v1", "Deployment");
        let mut old = one;
        default(kind, &mut old);
        prepare_create(kind, &mut old, &context());
        let mut new = old.clone();
        default(kind, &mut new);
        prepare_update(kind, None, &mut new, &old);
        prop_assert_eq!(&new["metadata"]["generation"], &old["metadata"]["generation"]);
        prop_assert_eq!(&new["spec"], &old["spec"]);
    }
}
