//! `zitadel-tokens probe`: checks a health endpoint of an operator. `helm test` uses it, because the image has neither
//! a shell nor curl.

use std::time::Duration;

use clap::Args;

/// Longest wait for the response.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// Check a health endpoint of an operator.
#[derive(Args, Debug)]
pub struct Arguments {
    /// URL to request, such as `http://zitadel-tokens.zitadel-tokens.svc:8080/readyz`.
    url: reqwest::Url,
}

/// Requests the URL. Fails unless the response has a success status.
pub fn probe(arguments: Arguments) -> Result<(), String> {
    super::choose_tls()?;
    let runtime = tokio::runtime::Runtime::new().map_err(|e| format!("cannot start the async runtime: {e}"))?;
    let status = runtime.block_on(async {
        let client = reqwest::Client::builder().no_proxy().timeout(PROBE_TIMEOUT).build()?;
        Ok(client.get(arguments.url).send().await?.status())
    });
    match status.map_err(|e: reqwest::Error| format!("no response: {e}"))? {
        status if status.is_success() => Ok(()),
        status => Err(format!("the response status is {status}")),
    }
}
