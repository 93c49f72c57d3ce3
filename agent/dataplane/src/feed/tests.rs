//! Against a server that answers one request after the other.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, Uri};
use k8s_openapi::api::core::v1::Service;
use parking_lot::Mutex;

use super::*;

/// Longer than everything here takes together.
const PATIENCE: Duration = Duration::from_secs(60);

/// Answers with these, in turn, and keeps what was asked for; who asks for more waits for ever.
async fn server(answers: &[(u16, &str)]) -> (Client, Arc<Mutex<Vec<String>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let answers: VecDeque<_> = answers.iter().map(|(code, body)| (*code, (*body).to_owned())).collect();
    let answers = Arc::new(Mutex::new(answers));
    let log = Arc::clone(&asked);
    let router = Router::new().fallback(move |uri: Uri| {
        log.lock().push(uri.to_string());
        let next = answers.lock().pop_front();
        async move {
            let Some((code, body)) = next else { return std::future::pending().await };
            (StatusCode::from_u16(code).unwrap(), body)
        }
    });
    let listener = tokio::net::TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let config = kube::Config::new(format!("http://{address}").parse().unwrap());
    (Client::try_from(config).unwrap(), asked)
}

fn text(event: Event<Bytes>) -> String {
    let of = |what: &str, object: Bytes| format!("{what} {}", String::from_utf8(object.to_vec()).unwrap());
    match event {
        Event::Init => "begin".to_owned(),
        Event::InitApply(object) => of("listed", object),
        Event::InitDone => "end".to_owned(),
        Event::Apply(object) => of("applied", object),
        Event::Delete(object) => of("deleted", object),
    }
}

async fn events(client: &Client, count: usize) -> Vec<String> {
    let taken = feed::<Service>(client, "services").take(count).map(text).collect::<Vec<_>>();
    tokio::time::timeout(PATIENCE, taken).await.unwrap()
}

#[tokio::test]
async fn lists_in_pages_and_goes_on_from_the_newest_version() {
    let expired = r#"{"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}}"#;
    let first = [
        r#"{"type": "ADDED", "object": {"metadata": {"resourceVersion": "6"}, "a": 4}}"#,
        "this is no event",
        r#"{"type": "RENAMED", "object": {"metadata": {"resourceVersion": "7"}}}"#,
        // A server may write the object first.
        r#"{"object": {"metadata": {"resourceVersion": "8"}, "a": "\"}{"}, "type": "MODIFIED"}"#,
        r#"{"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "9"}}}"#,
        r#"{"type": "ADDED", "object": {"metadata": {"resourceV"#,
    ];
    let second = [r#"{"type": "DELETED", "object": {"metadata": {"resourceVersion": "10"}}}"#, expired, ""];
    let (client, asked) = server(&[
        (
            200,
            r#"{"metadata": {"resourceVersion": "5", "continue": "more"}, "items": [{"a": 1}, {"a": [2]}]}"#,
        ),
        (200, r#"{"items": [{"a": "]"}], "metadata": {"resourceVersion": "5", "continue": ""}}"#),
        (200, &first.join("\n")),
        (200, &second.join("\n")),
        (200, r#"{"metadata": {"resourceVersion": "11"}, "items": null}"#),
        (200, ""),
    ])
    .await;
    let expected = [
        "begin",
        r#"listed {"a": 1}"#,
        r#"listed {"a": [2]}"#,
        r#"listed {"a": "]"}"#,
        "end",
        r#"applied {"metadata": {"resourceVersion": "6"}, "a": 4}"#,
        r#"applied {"metadata": {"resourceVersion": "8"}, "a": "\"}{"}"#,
        r#"deleted {"metadata": {"resourceVersion": "10"}}"#,
        "begin",
        "end",
    ];
    assert_eq!(events(&client, expected.len()).await, expected);
    let asked = asked.lock().clone();
    let watch =
        |version| format!("watch=true&timeoutSeconds=290&allowWatchBookmarks=true&resourceVersion={version}");
    let wanted = ["limit=500", "limit=500&continue=more", &watch(5), &watch(9), "limit=500"];
    assert_eq!(asked.len(), wanted.len(), "{asked:?}");
    for (asked, wanted) in asked.iter().zip(wanted) {
        assert_eq!(asked.replace("?&", "?"), format!("/api/v1/services?{wanted}"));
    }
}

#[tokio::test]
async fn a_list_that_fails_begins_anew_with_its_first_page() {
    let page = r#"{"metadata": {"resourceVersion": "5", "continue": "more"}, "items": [{"a": 1}]}"#;
    let gone =
        r#"{"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired", "message": "too old"}"#;
    let last = r#"{"metadata": {"resourceVersion": "6"}, "items": [{"a": 2}]}"#;
    let (client, asked) = server(&[(200, page), (410, gone), (200, last)]).await;
    let expected = ["begin", r#"listed {"a": 1}"#, "begin", r#"listed {"a": 2}"#, "end"];
    assert_eq!(events(&client, expected.len()).await, expected);
    assert_eq!(asked.lock().len(), 3);
}

#[test]
fn what_is_no_page_is_an_error() {
    let read = |text: &'static str| page::read(&Bytes::from_static(text.as_bytes()));
    assert!(matches!(read(r#"{"metadata": {}, "items": []}"#), Err(Error::Unversioned)));
    assert!(matches!(read(r#"{"items": [{"a": 1}"#), Err(Error::Page(_))));
    let mut page = read(r#"{"items": [null, 1], "metadata": {"continue": "more"}}"#).unwrap();
    assert_eq!((page.objects.next().as_deref(), page.last), (Some(&b"null"[..]), None));
}
