//! Owns the way of a request: who, may, what, answer.

use crate::accept;
use crate::api::Api;
use crate::authn::{self, Peer};
use crate::authz::{Attributes, Decision, refusal};
use crate::body::{Request, Response};
use crate::identity::User;
use crate::registry::{self, Call};
use crate::request_info::{Query, RequestInfo};
use crate::{nonresource, reply, reviews};
use futures::future::BoxFuture;
use http::HeaderMap;
use http::header::{CACHE_CONTROL, HeaderValue};
use std::sync::Arc;
use std::time::Instant;
use weft_control_api::status::{GroupResource, Status};

impl Api {
    /// Answers a request.
    pub(crate) fn handle(self: Arc<Self>, request: Request) -> BoxFuture<'static, Response> {
        Box::pin(self.observe(request))
    }

    /// Counts a request and marks its answer.
    async fn observe(self: Arc<Self>, request: Request) -> Response {
        let started = Instant::now();
        let query = Query::parse(request.uri().query());
        let info = RequestInfo::parse(request.method(), request.uri().path(), &query);
        let in_flight = self.metrics.begin(&info);
        let mut response = match self.clone().route(&info, &query, request).await {
            Ok(response) => response,
            Err(status) => reply::status(&status),
        };
        drop(in_flight);
        self.metrics.finish(&info, response.status(), started.elapsed());
        let headers = response.headers_mut();
        headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-cache, private"));
        if let Ok(id) = HeaderValue::from_str(&uuid::Uuid::new_v4().to_string()) {
            headers.insert("audit-id", id);
        }
        response
    }

    async fn route(
        self: Arc<Self>,
        info: &RequestInfo,
        query: &Query,
        request: Request,
    ) -> Result<Response, Status> {
        let (head, body) = request.into_parts();
        let peer = head.extensions.get::<Peer>();
        let user = authn::authenticate(&self.tokens, peer, &head.headers).map_err(|error| {
            tracing::debug!(error = %crate::cache::Chain(&error), path = info.path, "unauthenticated");
            Status::unauthorized()
        })?;
        let user = self.impersonate(user, &head.headers)?;
        self.require(&user, &Attributes::of(info, query.get("fieldSelector")))?;
        if !info.is_resource {
            return nonresource::answer(&self, info, query, &head).await;
        }
        let (group, version) = (info.group.as_str(), info.version.as_str());
        let kind = weft_control_api::kinds::served()
            .find(|kind| kind.plural == info.resource && kind.group == group && kind.version == version)
            .ok_or_else(Status::unknown_path)?;
        if !kind.namespaced && !info.namespace.is_empty() && info.resource != "namespaces" {
            return Err(Status::unknown_path());
        }
        let call = Call {
            resource: self.resources.by_plural(kind.group, kind.plural).cloned(),
            api: self,
            user,
            info: info.clone(),
            query: query.clone(),
            gzip: accept::takes_gzip(&head.headers),
            head,
            kind,
        };
        if call.resource.is_none() {
            return reviews::answer(&call, body).await;
        }
        registry::answer(call, body).await
    }

    /// Refuses what the authorizers don't allow.
    pub(crate) fn require(&self, user: &User, what: &Attributes) -> Result<(), Status> {
        match self.authorizer.authorize(user, what) {
            Decision::Allow(_) => Ok(()),
            Decision::Deny(reason) => {
                let resource = GroupResource { group: &what.group, resource: &what.resource };
                Err(Status::forbidden(resource, &what.name, &refusal(user, what, &reason)))
            }
        }
    }

    fn impersonate(&self, user: User, headers: &HeaderMap) -> Result<User, Status> {
        let wanted = authn::impersonation(headers).map_err(Status::internal)?;
        let Some(wanted) = wanted else { return Ok(user) };
        let ask = |resource: &str, namespace: &str, name: &str, group: &str, subresource: &str| Attributes {
            verb: "impersonate".into(),
            group: group.into(),
            resource: resource.into(),
            subresource: subresource.into(),
            namespace: namespace.into(),
            name: name.into(),
            is_resource: true,
            ..Attributes::default()
        };
        match wanted.user.as_service_account() {
            Some((namespace, name)) => {
                self.require(&user, &ask("serviceaccounts", namespace, name, "", ""))?
            }
            None => self.require(&user, &ask("users", "", &wanted.user.name, "", ""))?,
        }
        for group in &wanted.groups {
            self.require(&user, &ask("groups", "", group, "", ""))?;
        }
        let authentication = "authentication.k8s.io";
        if !wanted.user.uid.is_empty() {
            self.require(&user, &ask("uids", "", &wanted.user.uid, authentication, ""))?;
        }
        for (key, values) in &wanted.user.extra {
            for value in values {
                self.require(&user, &ask("userextras", "", value, authentication, key))?;
            }
        }
        Ok(wanted.user)
    }
}
