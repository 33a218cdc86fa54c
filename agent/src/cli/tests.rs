//! What `agentctl` prints and exits with, against an agent on a real socket.

use clap::Parser;

use super::*;
use crate::grafter::{CalleeState, GuardState};
use crate::testing::{
    BROKEN, FakeGrafter, FakeProc, FakeServer, FakeWorker, IDLE, PROVEN, graft, living,
};

async fn agentctl(server: &FakeServer, line: &str) -> (Exit, String, String) {
    let socket = server.socket.to_str().unwrap();
    let args = ["agentctl", "--socket", socket]
        .into_iter()
        .chain(line.split(' '));
    let args = Args::try_parse_from(args).unwrap();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let exit = run(&args, || Screen::Paper, &mut out, &mut err).await;
    (
        exit,
        String::from_utf8(out).unwrap(),
        String::from_utf8(err).unwrap(),
    )
}

fn server(foo: [FakeWorker; 2]) -> FakeServer {
    let [first, second] = foo;
    let workers = [(11, first), (12, second), (21, living(&[]))];
    FakeServer::start(FakeProc::example(), FakeGrafter::new(workers))
}

fn fused() -> FakeWorker {
    FakeWorker {
        grafts: vec![graft("Bar", PROVEN)],
        ..living(&[])
    }
}

#[tokio::test]
async fn ps_lists_functions_and_workers() {
    let server = server([fused(), living(&[])]);
    let (exit, out, err) = agentctl(&server, "ps").await;
    assert_eq!((exit, err.as_str()), (Exit::Done, ""));
    let expected = "\
FUNCTION  PID  INSIDE  CONTAINER     LIBRARY               BUILD-ID      THREADS  FUSED
Foo       11   8       cccccccccccc  /functions/libfoo.so  abababababab  2        Bar (ready)
Foo       12   8       cccccccccccc  /functions/libfoo.so  abababababab  2        -
Bar       21   8       cccccccccccc  /functions/libbar.so  abababababab  2        -
Baz       -    -       -             -                     -             -        no workers
Gopher    31   8       -             -                     -             2        not native (Go): can't be fused
";
    assert_eq!(out, expected);
}

#[tokio::test]
async fn patch_says_per_worker_what_was_done_and_proves_it() {
    let server = server([living(&[PROVEN]), living(&[PROVEN])]);
    let (exit, out, err) = agentctl(&server, "patch foo bar").await;
    assert_eq!((exit, err.as_str()), (Exit::Done, ""));
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "Foo → Bar: fused in 2 of 2 workers");
    assert!(lines[1].starts_with("WORKER  INSIDE  CONTAINER     OUTCOME      SITES  COMMIT STOP"));
    assert!(lines[2].starts_with(
        "11      8       cccccccccccc  fused first  1      88 µs        108 µs in 2  ready, 12 fused \
         calls in "
    ), "{out}");
    assert_eq!(
        lines[4],
        "worker 11: site 0x7f0000001000: 49 89 e0 ff 55 08 is now 90 e8 fb 0f 00 00"
    );
}

#[tokio::test]
async fn patching_again_says_so_and_exits_0() {
    let server = server([fused(), fused()]);
    let (exit, out, _) = agentctl(&server, "patch Foo Bar").await;
    assert_eq!(exit, Exit::Done);
    assert!(
        out.starts_with("Foo → Bar: already fused in 2 workers; nothing was done\n"),
        "{out}"
    );
}

#[tokio::test]
async fn nothing_to_revert_says_so_and_exits_0() {
    let server = server([living(&[]), living(&[])]);
    let (exit, out, _) = agentctl(&server, "revert Foo Bar").await;
    assert_eq!(exit, Exit::Done);
    assert!(
        out.starts_with("Foo → Bar: is not fused; there was nothing to revert\n"),
        "{out}"
    );
}

#[tokio::test]
async fn revert_says_what_is_back() {
    let server = server([fused(), fused()]);
    let (exit, out, _) = agentctl(&server, "revert Foo Bar").await;
    assert_eq!(exit, Exit::Done);
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "Foo → Bar: RPC again in 2 of 2 workers");
    assert_eq!(
        lines[2],
        "11      8       cccccccccccc  restored  40 µs in 1  12"
    );
}

#[tokio::test]
async fn an_error_goes_to_stderr_with_code_and_hint() {
    let server = server([living(&[]), living(&[])]);
    let (exit, out, err) = agentctl(&server, "patch Fob Bar").await;
    assert_eq!((exit, out.as_str()), (Exit::Refused, ""));
    assert_eq!(
        err,
        "agentctl: there is no function \"Fob\" on this node (near: Foo) [unknown-function]\n  \
         `agentctl ps` lists the functions\n"
    );
}

#[tokio::test]
async fn a_failed_canary_shows_what_was_done_and_why_it_stopped() {
    let server = server([living(&[BROKEN]), living(&[PROVEN])]);
    let (exit, out, err) = agentctl(&server, "patch Foo Bar").await;
    assert_eq!(exit, Exit::Refused);
    assert!(
        out.starts_with("Foo → Bar: fused in 0 of 2 workers\n"),
        "{out}"
    );
    assert!(
        out.contains("reverted first") && out.contains("left alone"),
        "{out}"
    );
    assert!(err.starts_with(
        "agentctl: the first worker (pid 11) did not prove well and was reverted: Bar failed to \
         initialise: faas_init returned 1 [canary-failed]\n"
    ), "{err}");
}

#[tokio::test]
async fn a_worker_that_exits_meanwhile_is_reported_and_no_failure() {
    let dying = FakeWorker {
        dies_in_patch: true,
        ..living(&[])
    };
    let server = server([dying, living(&[PROVEN])]);
    let (exit, out, _) = agentctl(&server, "patch Foo Bar").await;
    assert_eq!(exit, Exit::Done);
    assert!(
        out.contains("note: exited meanwhile: workers 11\n"),
        "{out}"
    );
}

#[tokio::test]
async fn json_is_one_line_for_answers_and_errors_alike() {
    let server = server([living(&[IDLE]), living(&[IDLE])]);
    let (exit, out, _) = agentctl(&server, "patch Foo Bar --canary-wait 0ms --json").await;
    assert_eq!((exit, out.lines().count()), (Exit::Done, 1));
    let report: PatchReport = serde_json::from_str(&out).unwrap();
    assert_eq!(report.workers.len(), 2);

    let (exit, out, err) = agentctl(&server, "explain Foo Baz --json").await;
    assert_eq!(
        (exit, out.lines().count(), err.as_str()),
        (Exit::Refused, 1, "")
    );
    let body: ErrorBody = serde_json::from_str(&out).unwrap();
    assert_eq!(body.error.code, "no-workers");
    assert_eq!(body.error.message, "function Baz has no running worker");
}

#[tokio::test]
async fn status_shows_counters_and_their_sums() {
    let server = server([fused(), fused()]);
    let (exit, out, _) = agentctl(&server, "status").await;
    assert_eq!(exit, Exit::Done);
    let expected = "\
EDGE       WORKER  CONTAINER     STATE  FUSED CALLS  ERRORS  RPC CALLS  FUSED MEAN  MAPPED
Foo → Bar  11      cccccccccccc  ready  12           0       4          -           64.0 KiB
Foo → Bar  12      cccccccccccc  ready  12           0       4          -           64.0 KiB
Foo → Bar  all                          24           0       8          -           128.0 KiB
";
    assert_eq!(out, expected);
    let (_, out, _) = agentctl(&self::server([living(&[]), living(&[])]), "status").await;
    assert_eq!(out, "nothing is fused\n");
}

#[tokio::test]
async fn status_tells_of_guards_and_of_a_crash_that_was_outlived() {
    let (mut on, mut crashed) = (fused(), fused());
    on.grafts[0].guard = GuardState::On;
    let graft = &mut crashed.grafts[0];
    graft.guard = GuardState::Taken;
    graft.state = CalleeState::Crashed;
    graft.gate_on = false;
    graft.failure = Some("a guarded call raised SIGSEGV at libbar.so+0x1139".to_owned());
    let (exit, out, _) = agentctl(&server([on, crashed]), "status").await;
    assert_eq!(exit, Exit::Done);
    let expected = "\
EDGE       WORKER  CONTAINER     STATE    FUSED CALLS  ERRORS  RPC CALLS  FUSED MEAN  MAPPED
Foo → Bar  11      cccccccccccc  ready    12           0       4          -           64.0 KiB
Foo → Bar  12      cccccccccccc  crashed  12           0       4          -           64.0 KiB
Foo → Bar  all                            24           0       8          -           128.0 KiB
worker 11: Bar: guarded against its crashes
worker 12: Bar: the guard is off: the worker has taken one of the signals for itself since
worker 12: Bar: a guarded call raised SIGSEGV at libbar.so+0x1139
";
    assert_eq!(out, expected);
}

#[tokio::test]
async fn explain_shows_the_plan() {
    let server = server([living(&[]), living(&[])]);
    let (exit, out, _) = agentctl(&server, "explain foo bar").await;
    assert_eq!(exit, Exit::Done);
    assert_eq!(
        out,
        "Foo → Bar: plan for worker 11, callee as in worker 21 (nothing was touched)\n\n\
         map Bar of 21 into 11\n"
    );
}

#[tokio::test]
async fn health_answers() {
    let server = server([living(&[]), living(&[])]);
    let (exit, out, _) = agentctl(&server, "health").await;
    assert_eq!(exit, Exit::Done);
    assert!(
        out.starts_with(&format!("agent 0.1.0 (pid {})", std::process::id())),
        "{out}"
    );
}
