use super::*;
use std::io::Write;

fn entry(second: u32, tag: &str, text: &str) -> String {
    format!("2026-01-01T00:00:{second:02}.000000000Z stdout {tag} {text}\n")
}

async fn read(log: &Path, options: Options) -> String {
    let (sink, mut receiver) = mpsc::channel(4);
    let copy = async move {
        copy(log, &options, &sink, std::future::ready(())).await.unwrap();
        drop(sink);
    };
    let collect = async {
        let mut text = Vec::new();
        while let Some(chunk) = receiver.recv().await {
            text.extend_from_slice(&chunk.unwrap());
        }
        String::from_utf8(text).unwrap()
    };
    tokio::join!(copy, collect).1
}

#[test]
fn lines_are_parsed_strictly() {
    let line = parse(b"2026-01-01T00:00:01.5Z stderr P hello  world").unwrap();
    assert!(line.partial && line.text == b"hello  world");
    assert_eq!(parse(b"2026-01-01T00:00:01Z stdout F").unwrap().text, b"");
    for bad in ["", "x stdout F a", "2026-01-01T00:00:01Z both F a", "2026-01-01T00:00:01Z stdout X a"] {
        assert_eq!(parse(bad.as_bytes()), None, "{bad}");
    }
}

#[tokio::test]
async fn tail_since_limit_and_timestamps() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("0.log");
    std::fs::write(
        &log,
        entry(1, "F", "one") + &entry(2, "P", "tw") + &entry(2, "F", "o") + &entry(3, "F", "three"),
    )
    .unwrap();
    std::fs::write(dir.path().join("0.log.20260101-000000"), entry(0, "F", "zero")).unwrap();
    let with = |change: fn(&mut Options)| {
        let mut options = Options::default();
        change(&mut options);
        options
    };
    assert_eq!(read(&log, Options::default()).await, "zero\none\ntwo\nthree\n");
    assert_eq!(read(&log, with(|o| o.tail = Some(1))).await, "three\n");
    assert_eq!(read(&log, with(|o| o.tail = Some(0))).await, "");
    assert_eq!(read(&log, with(|o| o.tail = Some(5))).await, "zero\none\ntwo\nthree\n");
    assert_eq!(read(&log, with(|o| o.limit_bytes = Some(7))).await, "zero\non");
    assert_eq!(
        read(&log, with(|o| o.since = Some("2026-01-01T00:00:03Z".parse().unwrap()))).await,
        "three\n"
    );
    assert_eq!(
        read(&log, with(|o| (o.timestamps, o.tail) = (true, Some(1)))).await,
        "2026-01-01T00:00:03.000000000Z three\n"
    );
}

#[tokio::test]
async fn a_line_that_is_being_written_is_not_counted() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("0.log");
    let half = &entry(3, "F", "three")[..20];
    std::fs::write(&log, entry(1, "F", "one") + &entry(2, "F", "two") + half).unwrap();
    for (tail, lines) in [(0, ""), (1, "two\n"), (2, "one\ntwo\n"), (3, "one\ntwo\n")] {
        let options = Options { tail: Some(tail), ..Options::default() };
        assert_eq!(read(&log, options).await, lines, "{tail}");
    }
}

#[test]
fn a_tail_stays_one_while_the_log_grows() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("0.log");
    std::fs::write(&log, entry(0, "F", "x").repeat(10)).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let mut file = std::fs::OpenOptions::new().append(true).open(&log).unwrap();
    let mut counts = Vec::new();
    std::thread::scope(|threads| {
        threads.spawn(|| {
            // Bounded, so that a failed read can't leave it behind.
            for _ in 0..1_000_000 {
                if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    break;
                }
                file.write_all(entry(1, "F", "x").as_bytes()).unwrap();
            }
        });
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for _ in 0..100 {
            let options = Options { tail: Some(5), ..Options::default() };
            counts.push(runtime.block_on(read(&log, options)).lines().count());
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(counts, [5; 100]);
}

#[tokio::test]
async fn following_sees_writes_and_rotation_and_ends_with_the_container() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("0.log");
    std::fs::write(&log, entry(1, "F", "one")).unwrap();
    let (sink, mut receiver) = mpsc::channel(4);
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let options = Options { follow: true, ..Options::default() };
    let path = log.clone();
    let task =
        tokio::spawn(async move { copy(&path, &options, &sink, async { ended.await.unwrap() }).await });
    let mut next = async || String::from_utf8(receiver.recv().await.unwrap().unwrap().to_vec()).unwrap();
    assert_eq!(next().await, "one\n");
    let append = |text: &str| {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    };
    append(&entry(2, "F", "two"));
    assert_eq!(next().await, "two\n");
    std::fs::rename(&log, dir.path().join("0.log.20260101-000002")).unwrap();
    append(&entry(3, "F", "three"));
    assert_eq!(next().await, "three\n");
    end.send(()).unwrap();
    task.await.unwrap().unwrap();
    assert!(receiver.recv().await.is_none());
}
