//! Owns the default RBAC policy: upstream's roles and bindings for users, nodes and the components weft has.

use serde_json::{Value, json};

/// Verbs, API groups and resources, each separated by spaces; `core` is the core group.
type Row = (&'static str, &'static str, &'static str);

const READ: &str = "get list watch";
const WRITE: &str = "create delete deletecollection patch update";
const ALL: &str = "create delete deletecollection get list patch update watch";
const EVENTS: Row = ("create patch update", "core events.k8s.io", "events");

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().map(|word| if word == "core" { "" } else { word }).collect()
}

fn rules(rows: &[Row]) -> Vec<Value> {
    rows.iter()
        .map(|(verbs, groups, resources)| {
            json!({"verbs": words(verbs), "apiGroups": words(groups), "resources": words(resources)})
        })
        .collect()
}

fn metadata(name: &str, labels: &[(&str, &str)]) -> Value {
    let mut all = json!({"kubernetes.io/bootstrapping": "rbac-defaults"});
    for (key, value) in labels {
        all[*key] = json!(value);
    }
    json!({"name": name, "labels": all, "annotations": {"rbac.authorization.kubernetes.io/autoupdate": "true"}})
}

fn cluster_role(name: &str, labels: &[(&str, &str)], rules: Vec<Value>) -> Value {
    json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": metadata(name, labels), "rules": rules})
}

fn aggregated_role(name: &str, labels: &[(&str, &str)], from: &[&str]) -> Value {
    let selectors: Vec<Value> = from
        .iter()
        .map(|level| json!({"matchLabels": {format!("rbac.authorization.k8s.io/aggregate-to-{level}"): "true"}}))
        .collect();
    json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": metadata(name, labels), "aggregationRule": {"clusterRoleSelectors": selectors}, "rules": []})
}

fn subject(kind: &str, name: &str) -> Value {
    match name.split_once('/') {
        Some((namespace, name)) if kind == "ServiceAccount" => {
            json!({"kind": kind, "name": name, "namespace": namespace})
        }
        _ => json!({"kind": kind, "apiGroup": "rbac.authorization.k8s.io", "name": name}),
    }
}

fn cluster_binding(name: &str, role: &str, subjects: &[Value]) -> Value {
    json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": metadata(name, &[]), "subjects": subjects,
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role}})
}

/// The rules of kubelets, as far as they don't depend on what their pods refer to.
pub(crate) fn node_rules() -> Vec<Value> {
    rules(&[
        ("create", "authentication.k8s.io", "tokenreviews"),
        ("create", "authorization.k8s.io", "subjectaccessreviews localsubjectaccessreviews"),
        (READ, "core", "services"),
        ("create get list watch", "core", "nodes"),
        ("patch update", "core", "nodes nodes/status"),
        EVENTS,
        (READ, "core", "pods"),
        ("create delete", "core", "pods"),
        ("patch update", "core", "pods/status"),
        ("create", "core", "pods/eviction"),
        (READ, "core", "configmaps secrets"),
        ("get", "core", "persistentvolumeclaims persistentvolumes"),
        ("create get list watch", "certificates.k8s.io", "certificatesigningrequests"),
        ("get create update patch delete", "coordination.k8s.io", "leases"),
        ("get", "storage.k8s.io", "volumeattachments"),
        ("create", "core", "serviceaccounts/token"),
        ("get create update patch delete", "storage.k8s.io", "csinodes"),
        (READ, "storage.k8s.io", "csidrivers"),
        (READ, "node.k8s.io", "runtimeclasses"),
        (READ, "discovery.k8s.io", "endpointslices"),
    ])
}

fn user_roles() -> Vec<Value> {
    let everything = json!([
        {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]},
        {"verbs": ["*"], "nonResourceURLs": ["*"]},
    ]);
    let admin = ("rbac.authorization.k8s.io/aggregate-to-admin", "true");
    let edit = ("rbac.authorization.k8s.io/aggregate-to-edit", "true");
    let view = ("rbac.authorization.k8s.io/aggregate-to-view", "true");
    vec![
        cluster_role("cluster-admin", &[], everything.as_array().cloned().unwrap_or_default()),
        aggregated_role("admin", &[], &["admin"]),
        aggregated_role("edit", &[admin], &["edit"]),
        aggregated_role("view", &[edit], &["view"]),
        cluster_role("system:aggregate-to-admin", &[admin], rules(&admin_rows())),
        cluster_role("system:aggregate-to-edit", &[edit], rules(&edit_rows())),
        cluster_role("system:aggregate-to-view", &[view], rules(&view_rows())),
    ]
}

fn admin_rows() -> Vec<Row> {
    vec![
        ("create", "authorization.k8s.io", "localsubjectaccessreviews"),
        (ALL, "rbac.authorization.k8s.io", "roles rolebindings"),
    ]
}

fn edit_rows() -> Vec<Row> {
    vec![
        (READ, "core", "pods/attach pods/proxy pods/exec pods/portforward secrets services/proxy"),
        ("impersonate", "core", "serviceaccounts"),
        (WRITE, "core", "pods pods/attach pods/proxy pods/exec pods/portforward"),
        ("create", "core", "pods/eviction"),
        (
            WRITE,
            "core",
            "replicationcontrollers replicationcontrollers/scale serviceaccounts services services/proxy \
             persistentvolumeclaims configmaps secrets events",
        ),
        ("create", "core", "serviceaccounts/token"),
        (
            WRITE,
            "apps",
            "statefulsets statefulsets/scale daemonsets deployments deployments/scale deployments/rollback \
             replicasets replicasets/scale",
        ),
        (WRITE, "autoscaling", "horizontalpodautoscalers"),
        (WRITE, "batch", "jobs cronjobs"),
        (WRITE, "policy", "poddisruptionbudgets"),
        (WRITE, "networking.k8s.io", "networkpolicies ingresses"),
        (ALL, "coordination.k8s.io", "leases"),
    ]
}

fn view_rows() -> Vec<Row> {
    vec![
        (
            READ,
            "core",
            "pods replicationcontrollers replicationcontrollers/scale serviceaccounts services endpoints \
             persistentvolumeclaims configmaps limitranges resourcequotas bindings events pods/status \
             resourcequotas/status namespaces/status replicationcontrollers/status pods/log services/status \
             persistentvolumeclaims/status namespaces",
        ),
        (READ, "discovery.k8s.io", "endpointslices"),
        (
            READ,
            "apps",
            "controllerrevisions statefulsets statefulsets/status statefulsets/scale daemonsets \
             daemonsets/status deployments deployments/status deployments/scale replicasets \
             replicasets/status replicasets/scale",
        ),
        (READ, "autoscaling", "horizontalpodautoscalers horizontalpodautoscalers/status"),
        (READ, "batch", "jobs cronjobs cronjobs/status jobs/status"),
        (READ, "policy", "poddisruptionbudgets poddisruptionbudgets/status"),
        (READ, "networking.k8s.io", "networkpolicies ingresses ingresses/status"),
    ]
}

fn public_roles() -> Vec<Value> {
    let discovery = [
        "/api",
        "/api/*",
        "/apis",
        "/apis/*",
        "/healthz",
        "/livez",
        "/openapi",
        "/openapi/*",
        "/readyz",
        "/version",
        "/version/",
    ];
    let public = ["/healthz", "/livez", "/readyz", "/version", "/version/"];
    let monitoring =
        ["/healthz", "/healthz/*", "/livez", "/livez/*", "/metrics", "/metrics/slis", "/readyz", "/readyz/*"];
    let get = |urls: &[&str]| vec![json!({"verbs": ["get"], "nonResourceURLs": urls})];
    vec![
        cluster_role("system:discovery", &[], get(&discovery)),
        cluster_role("system:public-info-viewer", &[], get(&public)),
        cluster_role("system:monitoring", &[], get(&monitoring)),
        cluster_role(
            "system:service-account-issuer-discovery",
            &[],
            get(&[
                "/.well-known/openid-configuration",
                "/.well-known/openid-configuration/",
                "/openid/v1/jwks",
                "/openid/v1/jwks/",
            ]),
        ),
        cluster_role(
            "system:basic-user",
            &[],
            rules(&[
                ("create", "authorization.k8s.io", "selfsubjectaccessreviews selfsubjectrulesreviews"),
                ("create", "authentication.k8s.io", "selfsubjectreviews"),
            ]),
        ),
    ]
}

fn component_roles() -> Vec<Value> {
    let mut scheduler = rules(&scheduler_rows());
    scheduler.push(json!({"verbs": ["get", "update"], "apiGroups": ["coordination.k8s.io"],
        "resources": ["leases"], "resourceNames": ["kube-scheduler"]}));
    vec![
        cluster_role("system:node", &[], node_rules()),
        cluster_role("system:kube-scheduler", &[], scheduler),
        cluster_role(
            "system:kube-dns",
            &[],
            rules(&[
                ("list watch", "core", "endpoints services"),
                ("get list watch", "core", "pods namespaces nodes"),
                ("list watch", "discovery.k8s.io", "endpointslices"),
            ]),
        ),
        cluster_role(
            "system:node-proxier",
            &[],
            rules(&[
                ("list watch", "core", "services endpoints"),
                (READ, "core", "nodes"),
                EVENTS,
                ("list watch", "discovery.k8s.io", "endpointslices"),
                ("list watch", "networking.k8s.io", "servicecidrs networkpolicies"),
                // weft's proxy carries policy and pod addresses too.
                ("list watch", "core", "pods namespaces"),
            ]),
        ),
        cluster_role(
            "system:kubelet-api-admin",
            &[],
            rules(&[
                (READ, "core", "nodes"),
                ("proxy", "core", "nodes"),
                (
                    "*",
                    "core",
                    "nodes/log nodes/metrics nodes/proxy nodes/stats nodes/configz nodes/healthz nodes/pods",
                ),
            ]),
        ),
        cluster_role(
            "system:auth-delegator",
            &[],
            rules(&[
                ("create", "authentication.k8s.io", "tokenreviews"),
                ("create", "authorization.k8s.io", "subjectaccessreviews"),
            ]),
        ),
        cluster_role("system:kube-controller-manager", &[], rules(&controller_manager_rows())),
    ]
}

fn controller_manager_rows() -> Vec<Row> {
    vec![
        EVENTS,
        ("create get list patch update watch", "coordination.k8s.io", "leases"),
        ("create get delete update", "core", "secrets serviceaccounts"),
        ("get", "core", "namespaces configmaps"),
        ("create", "core", "serviceaccounts/token"),
        ("create", "authentication.k8s.io", "tokenreviews"),
        ("create", "authorization.k8s.io", "subjectaccessreviews"),
        // The caches that all controllers share.
        ("list watch", "*", "*"),
    ]
}

fn scheduler_rows() -> Vec<Row> {
    vec![
        EVENTS,
        ("create list watch", "coordination.k8s.io", "leases"),
        (READ, "core", "nodes"),
        ("delete get list watch", "core", "pods"),
        ("create", "core", "bindings pods/binding"),
        ("patch update", "core", "pods/status"),
        (READ, "core", "replicationcontrollers services namespaces"),
        (READ, "apps", "replicasets statefulsets"),
        (READ, "policy", "poddisruptionbudgets"),
        ("get list patch update watch", "core", "persistentvolumeclaims persistentvolumes"),
        ("create", "authentication.k8s.io", "tokenreviews"),
        ("create", "authorization.k8s.io", "subjectaccessreviews"),
        (READ, "storage.k8s.io", "csinodes storageclasses csidrivers csistoragecapacities volumeattachments"),
        (READ, "resource.k8s.io", "deviceclasses resourceslices resourceclaims"),
    ]
}

/// The controllers: the name of the role after `system:controller:`, which is the service account's too.
fn controllers() -> Vec<(&'static str, Vec<Row>)> {
    vec![
        (
            "deployment-controller",
            vec![
                ("get list update watch patch", "apps", "deployments"),
                ("update patch", "apps", "deployments/status deployments/finalizers"),
                ("create delete get list patch update watch", "apps", "replicasets"),
                ("get list update watch", "core", "pods"),
                EVENTS,
            ],
        ),
        (
            "replicaset-controller",
            vec![
                ("get list update watch patch", "apps", "replicasets"),
                ("update patch", "apps", "replicasets/status replicasets/finalizers"),
                ("create delete get list patch watch", "core", "pods"),
                EVENTS,
            ],
        ),
        (
            "endpointslice-controller",
            vec![
                (READ, "core", "nodes pods services"),
                ("update", "core", "services/finalizers"),
                ("create delete get list update watch patch", "discovery.k8s.io", "endpointslices"),
                EVENTS,
            ],
        ),
        (
            "endpointslicemirroring-controller",
            vec![
                (READ, "core", "endpoints services"),
                ("update", "core", "services/finalizers endpoints/finalizers"),
                ("create delete get list update watch patch", "discovery.k8s.io", "endpointslices"),
                EVENTS,
            ],
        ),
        (
            "service-cidrs-controller",
            vec![
                ("get list watch patch update", "networking.k8s.io", "servicecidrs"),
                ("patch update", "networking.k8s.io", "servicecidrs/finalizers servicecidrs/status"),
                (READ, "networking.k8s.io", "ipaddresses"),
                EVENTS,
            ],
        ),
        (
            "service-controller",
            vec![(READ, "core", "services"), ("patch update", "core", "services/status"), EVENTS],
        ),
        (
            "endpoint-controller",
            vec![
                (READ, "core", "pods services"),
                ("create delete get list update watch patch", "core", "endpoints"),
                ("create", "core", "endpoints/restricted"),
                EVENTS,
            ],
        ),
    ]
    .into_iter()
    .chain(housekeepers())
    .collect()
}

/// The controllers that look after nodes, namespaces, accounts and what is left behind.
fn housekeepers() -> Vec<(&'static str, Vec<Row>)> {
    vec![
        (
            "namespace-controller",
            vec![
                ("delete get list watch", "core", "namespaces"),
                ("update patch", "core", "namespaces/finalize namespaces/status"),
                ("delete deletecollection get list", "*", "*"),
            ],
        ),
        ("generic-garbage-collector", vec![("delete get list patch update watch", "*", "*"), EVENTS]),
        (
            "node-controller",
            vec![
                ("delete get list patch update watch", "core", "nodes"),
                ("patch update", "core", "nodes/status pods/status"),
                ("delete get list watch", "core", "pods"),
                (READ, "coordination.k8s.io", "leases"),
                EVENTS,
            ],
        ),
        (
            "node-ipam-controller",
            vec![
                ("get list patch update watch", "core", "nodes"),
                ("patch update", "core", "nodes/status"),
                EVENTS,
            ],
        ),
        (
            "service-account-controller",
            vec![(READ, "core", "namespaces"), ("create get list watch", "core", "serviceaccounts"), EVENTS],
        ),
        (
            "root-ca-cert-publisher",
            vec![
                (READ, "core", "namespaces"),
                ("create get list update watch patch", "core", "configmaps"),
                EVENTS,
            ],
        ),
        (
            "clusterrole-aggregation-controller",
            vec![("escalate get list patch update watch", "rbac.authorization.k8s.io", "clusterroles")],
        ),
    ]
}

/// All cluster roles.
pub(crate) fn cluster_roles() -> Vec<Value> {
    let mut all = user_roles();
    all.extend(public_roles());
    all.extend(component_roles());
    all.extend(
        controllers()
            .iter()
            .map(|(name, rows)| cluster_role(&format!("system:controller:{name}"), &[], rules(rows))),
    );
    all
}

/// All cluster role bindings.
pub(crate) fn cluster_role_bindings() -> Vec<Value> {
    let group = |name| subject("Group", name);
    let user = |name| subject("User", name);
    let account = |name: &str| subject("ServiceAccount", &format!("kube-system/{name}"));
    let (authenticated, unauthenticated) = (group("system:authenticated"), group("system:unauthenticated"));
    let mut all = vec![
        cluster_binding("cluster-admin", "cluster-admin", &[group("system:masters")]),
        cluster_binding("system:discovery", "system:discovery", std::slice::from_ref(&authenticated)),
        cluster_binding("system:basic-user", "system:basic-user", std::slice::from_ref(&authenticated)),
        cluster_binding(
            "system:public-info-viewer",
            "system:public-info-viewer",
            &[authenticated, unauthenticated],
        ),
        cluster_binding("system:monitoring", "system:monitoring", &[group("system:monitoring")]),
        cluster_binding(
            "system:service-account-issuer-discovery",
            "system:service-account-issuer-discovery",
            &[group("system:serviceaccounts")],
        ),
        // The node authorizer decides; upstream's binding has no subjects either.
        cluster_binding("system:node", "system:node", &[]),
        cluster_binding("system:node-proxier", "system:node-proxier", &[user("system:kube-proxy")]),
        cluster_binding("system:kube-scheduler", "system:kube-scheduler", &[user("system:kube-scheduler")]),
        cluster_binding(
            "system:kube-controller-manager",
            "system:kube-controller-manager",
            &[user("system:kube-controller-manager")],
        ),
        cluster_binding(
            "system:kube-dns",
            "system:kube-dns",
            &[account("kube-dns"), account("coredns"), user("system:kube-dns")],
        ),
        cluster_binding(
            "system:kube-apiserver-to-kubelet",
            "system:kubelet-api-admin",
            &[user("system:kube-apiserver")],
        ),
    ];
    all.extend(controllers().iter().map(|(name, _)| {
        let role = format!("system:controller:{name}");
        cluster_binding(&role, &role, &[account(name)])
    }));
    all
}

fn namespaced(kind: &str, namespace: &str, name: &str, rest: Value) -> Value {
    let mut object = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind,
        "metadata": metadata(name, &[])});
    object["metadata"]["namespace"] = json!(namespace);
    for (key, value) in rest.as_object().into_iter().flatten() {
        object[key] = value.clone();
    }
    object
}

/// Roles and role bindings in `kube-system`: the leases of leader election, and the client CA's ConfigMap.
pub(crate) fn namespaced_roles() -> Vec<Value> {
    const NAMESPACE: &str = "kube-system";
    const LEADERS: &str = "system::leader-locking-controllers";
    const READER: &str = "extension-apiserver-authentication-reader";
    let reference =
        |name: &str| json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name});
    let mut leaders: Vec<Value> = controllers()
        .iter()
        .map(|(name, _)| subject("ServiceAccount", &format!("{NAMESPACE}/{name}")))
        .collect();
    leaders.push(subject("User", "system:kube-controller-manager"));
    leaders.push(subject("User", "system:kube-scheduler"));
    vec![
        namespaced(
            "Role",
            NAMESPACE,
            LEADERS,
            json!({"rules": rules(&[
                ("create get list patch update watch", "coordination.k8s.io", "leases"),
            ])}),
        ),
        namespaced(
            "RoleBinding",
            NAMESPACE,
            LEADERS,
            json!({"subjects": leaders, "roleRef": reference(LEADERS)}),
        ),
        namespaced(
            "Role",
            NAMESPACE,
            READER,
            json!({"rules": [{"verbs": ["get", "list", "watch"],
            "apiGroups": [""], "resources": ["configmaps"],
            "resourceNames": ["extension-apiserver-authentication"]}]}),
        ),
        namespaced(
            "RoleBinding",
            NAMESPACE,
            READER,
            json!({"roleRef": reference(READER), "subjects": [
            subject("User", "system:kube-controller-manager"), subject("User", "system:kube-scheduler")]}),
        ),
    ]
}
