//! Owns who gets in and who may do what.

use crate::support::Cluster;
use serde_json::{Value, json};

#[tokio::test]
async fn strangers_see_health_alone() {
    let cluster = Cluster::start().await;
    let path = cluster.write_kubeconfig("nobody", "");
    let http = cluster.https(&path).await;
    assert_eq!(http.get("/healthz").await.text, "ok");
    assert_eq!(http.get("/version").await.json()["minor"], "36");
    for (path, message) in [
        (
            "/api/v1/pods",
            "pods is forbidden: User \"system:anonymous\" cannot list resource \"pods\" in API group \"\" at the cluster scope",
        ),
        (
            "/api/v1/namespaces/default/secrets/a",
            "secrets \"a\" is forbidden: User \"system:anonymous\" cannot get resource \"secrets\" in API group \"\" in the namespace \"default\"",
        ),
        ("/apis", "forbidden: User \"system:anonymous\" cannot get path \"/apis\""),
        ("/openapi/v2", "forbidden: User \"system:anonymous\" cannot get path \"/openapi/v2\""),
        ("/metrics", "forbidden: User \"system:anonymous\" cannot get path \"/metrics\""),
    ] {
        assert_eq!(http.get(path).await.failure(), (403, "Forbidden".into(), message.into()));
    }
    // Nobody makes the server remember what they made up.
    for path in ["/apis/made.up/v1/things", "/api/v1/made-up", "/api/v1/namespaces/default/pods/a/made-up"] {
        assert_eq!(http.get(path).await.code, 403, "{path}");
    }
    assert_eq!(http.send("MADEUP", "/version", &[], "").await.code, 403);
    let metrics = cluster.admin().get("/metrics").await.text.to_lowercase();
    assert!(!metrics.contains("made"), "{metrics}");
    let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {"verb": "list", "resource": "pods"}}});
    let reviews = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
    assert_eq!(http.post(reviews, &review).await.code, 403);
    // Impersonation is a permission too.
    let masters = [("impersonate-user", "admin"), ("impersonate-group", "system:masters")];
    assert_eq!(http.send("GET", "/api/v1/pods", &masters, "").await.code, 403);
    // Bad credentials are worse than none.
    let path = cluster.write_kubeconfig("liar", "token: abc");
    let http = cluster.https(&path).await;
    assert_eq!(http.get("/healthz").await.failure(), (401, "Unauthorized".into(), "Unauthorized".into()));
    cluster.stop().await;
}

#[tokio::test]
async fn users_may_do_what_their_roles_say() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let path = cluster.kubeconfig("jane", &["readers"]);
    let jane = cluster.https(&path).await;
    let pods = "/api/v1/namespaces/default/pods";
    assert_eq!(jane.get(pods).await.failure(), (403, "Forbidden".into(),
        "pods is forbidden: User \"jane\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\"".into()));
    let (_, _, message) = jane.get("/apis/apps/v1/deployments").await.failure();
    assert_eq!(
        message,
        "deployments.apps is forbidden: User \"jane\" cannot list resource \"deployments\" in API \
        group \"apps\" at the cluster scope"
    );
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": "readers"}, "subjects": [{"kind": "Group", "name": "readers",
            "apiGroup": "rbac.authorization.k8s.io"}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"}});
    admin.create("/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings", &binding).await;
    assert_eq!(jane.get(pods).await.code, 200);
    assert_eq!(jane.get("/api/v1/namespaces/default/secrets").await.code, 403);
    assert_eq!(jane.get("/api/v1/namespaces/kube-system/pods").await.code, 403);
    let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {"verb": "list", "resource": "pods", "namespace": "default"}}});
    let answer = jane.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", &review).await.json();
    assert_eq!(answer["status"]["allowed"], true);
    // Nobody grants what they don't have.
    let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "writer"},
        "rules": [{"verbs": ["create", "get"], "apiGroups": ["rbac.authorization.k8s.io"], "resources": ["roles"]}]});
    let roles = "/apis/rbac.authorization.k8s.io/v1/namespaces/default/roles";
    admin.create(roles, &role).await;
    let mut bind = binding.clone();
    bind["metadata"]["name"] = json!("writers");
    bind["roleRef"] = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "writer"});
    admin.create("/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings", &bind).await;
    let mut greedy = role.clone();
    greedy["metadata"]["name"] = json!("greedy");
    greedy["rules"][0]["verbs"] = json!(["*"]);
    let (code, _, message) = jane.post(roles, &greedy).await.failure();
    assert_eq!(code, 403);
    assert!(message.contains("attempting to grant RBAC permissions not currently held"), "{message}");
    let mut modest = role.clone();
    modest["metadata"]["name"] = json!("modest");
    assert_eq!(jane.post(roles, &modest).await.code, 201);
    cluster.stop().await;
}

#[tokio::test]
async fn tokens_die_with_their_account() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let accounts = "/api/v1/namespaces/default/serviceaccounts";
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "robot"}});
    admin.create(accounts, &account).await;
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let made = admin.create(&format!("{accounts}/robot/token"), &request).await;
    let token = made["status"]["token"].as_str().unwrap().to_owned();
    let path = cluster.write_kubeconfig("robot", &format!("token: {token}"));
    let robot = cluster.https(&path).await;
    let me = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"});
    let reviews = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
    let who = robot.post(reviews, &me).await.json();
    assert_eq!(who["status"]["userInfo"]["username"], "system:serviceaccount:default:robot");
    assert_eq!(robot.get("/api/v1/pods").await.code, 403);
    let review =
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}});
    let path = "/apis/authentication.k8s.io/v1/tokenreviews";
    assert_eq!(admin.create(path, &review).await["status"]["authenticated"], true);
    admin.delete(&format!("{accounts}/robot")).await;
    assert_eq!(robot.post(reviews, &me).await.failure(), (401, "Unauthorized".into(), "Unauthorized".into()));
    // An account of the same name is another one.
    admin.create(accounts, &account).await;
    assert_eq!(robot.post(reviews, &me).await.code, 401);
    cluster.stop().await;
}

#[tokio::test]
async fn kubelets_touch_their_own() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let kubelet = cluster.http("system:node:n1", &["system:nodes"]);
    let node = |name: &str| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
    let made = kubelet.create("/api/v1/nodes", &node("n1")).await;
    assert_eq!(made["spec"]["taints"][0]["key"], "node.kubernetes.io/not-ready");
    assert_eq!(kubelet.post("/api/v1/nodes", &node("n2")).await.code, 403);
    assert_eq!(kubelet.get("/api/v1/nodes/n1").await.code, 200);
    admin.create("/api/v1/nodes", &node("n2")).await;
    assert_eq!(kubelet.get("/api/v1/nodes/n2").await.code, 403);
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
    admin.create("/api/v1/namespaces/default/serviceaccounts", &account).await;
    for name in ["mine", "other"] {
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}});
        admin.create("/api/v1/namespaces/default/secrets", &secret).await;
    }
    let pod = |name: &str, node: &str, secret: &str| {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"nodeName": node,
            "containers": [{"name": "c", "image": "i"}], "volumes": [{"name": "v", "secret": {"secretName": secret}}]}})
    };
    let pods = "/api/v1/namespaces/default/pods";
    admin.create(pods, &pod("a", "n1", "mine")).await;
    admin.create(pods, &pod("b", "n2", "other")).await;
    assert_eq!(kubelet.get("/api/v1/namespaces/default/secrets/mine").await.code, 200);
    assert_eq!(kubelet.get("/api/v1/namespaces/default/secrets/other").await.code, 403);
    assert_eq!(kubelet.get("/api/v1/pods").await.code, 403);
    let own: Value = kubelet.get("/api/v1/pods?fieldSelector=spec.nodeName%3Dn1").await.json();
    assert_eq!(own["items"].as_array().unwrap().len(), 1);
    let phase = json!({"status": {"phase": "Running"}});
    assert_eq!(kubelet.merge(&format!("{pods}/a/status"), &phase).await.json()["status"]["phase"], "Running");
    assert_eq!(kubelet.merge(&format!("{pods}/b/status"), &phase).await.code, 403);
    assert_eq!(kubelet.delete(&format!("{pods}/b")).await.code, 403);
    let token = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {
        "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": "a"}}});
    let path = "/api/v1/namespaces/default/serviceaccounts/default/token";
    assert_eq!(kubelet.post(path, &token).await.code, 201);
    let lease = |name: &str| json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}});
    let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    assert_eq!(kubelet.post(leases, &lease("n1")).await.code, 201);
    assert_eq!(kubelet.post(leases, &lease("n2")).await.code, 403);
    cluster.stop().await;
}
