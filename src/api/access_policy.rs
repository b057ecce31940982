//! `ZitadelAccessPolicy`: which namespaces may have tokens for which audiences. Cluster-scoped, owned by the
//! platform team.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::api::rules::{ID_PATTERN, ROLE_LEVEL, ROLE_PATTERN, USERNAME_PATTERN_PATTERN};
use crate::api::service_user::InstanceRef;

/// Allows the selected namespaces to have tokens for the listed audiences of one instance.
///
/// All policies of an instance form a union. An audience that no policy allows is denied.
/// `docs/adr/0008-access-policies-are-objects.md` explains why this is a separate kind.
#[allow(clippy::duplicated_attributes, reason = "each printcolumn has its own type_")]
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "zitadel-tokens.dev",
    version = "v1alpha1",
    kind = "ZitadelAccessPolicy",
    plural = "zitadelaccesspolicies",
    shortname = "zap",
    category = "zitadel",
    derive = "PartialEq",
    doc = "Allows the selected namespaces to have tokens for the listed audiences of one ZitadelInstance. Policies form a union. An audience that no policy allows is denied.",
    printcolumn(name = "Instance", type_ = "string", json_path = ".spec.instanceRef.name"),
    printcolumn(name = "Projects", type_ = "string", json_path = ".spec.audiences.projectIDs"),
    printcolumn(name = "ZITADEL API", type_ = "boolean", json_path = ".spec.audiences.zitadelAPI"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ZitadelAccessPolicySpec {
    /// The `ZitadelInstance` that this policy applies to. The instance may be created after the policy.
    pub instance_ref: InstanceRef,

    /// Selects the namespaces that this policy applies to, by their labels. `{}` selects every namespace. Prefer the
    /// label `kubernetes.io/metadata.name`: Kubernetes sets it, and tenants cannot change it.
    // Atomic, as in the built-in kinds: otherwise a server-side apply that changes the selector to `{}` stores null.
    #[schemars(extend("x-kubernetes-map-type" = "atomic", "properties" = {
        "matchLabels": {
            "type": "object", "maxProperties": 16, "additionalProperties": {"type": "string", "maxLength": 63},
            "description": "Labels that a namespace must have, with these values.",
            "x-kubernetes-validations": [{
                "rule": "self.all(k, k.size() <= 317)",
                "message": "namespaceSelector.matchLabels: a key must have at most 317 characters"
            }]
        },
        "matchExpressions": {
            "type": "array", "maxItems": 16, "description": "Requirements that the labels of a namespace must meet.",
            "items": {
                "type": "object", "required": ["key", "operator"],
                "properties": {
                    "key": {"type": "string", "maxLength": 317, "description": "Key of the label."},
                    "operator": {"type": "string", "enum": ["In", "NotIn", "Exists", "DoesNotExist"], "description": "How the label is compared with the values."},
                    "values": {"type": "array", "maxItems": 64, "items": {"type": "string", "maxLength": 63}, "description": "Values to compare with. Required for In and NotIn; must be empty for Exists and DoesNotExist."}
                },
                "x-kubernetes-validations": [{
                    "rule": "(self.operator in ['In', 'NotIn']) == (has(self.values) && self.values.size() > 0)",
                    "message": "namespaceSelector.matchExpressions: set values for In and NotIn; leave values empty for Exists and DoesNotExist"
                }]
            }
        }
    }))]
    pub namespace_selector: LabelSelector,

    /// Audiences that tokens in the selected namespaces may have. If absent, the policy allows none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audiences: Option<Audiences>,

    /// Service users that the operator may create or take over for the selected namespaces. If absent, the policy allows none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<Users>,

    /// Manager roles that service users in the selected namespaces may have. If absent, the policy allows none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub manager_roles: Vec<AllowedRoles>,
}

/// Manager roles that a policy allows, and where. Roles and IDs are listed one by one: there is no wildcard.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.instance) ? 1 : 0) + (has(self.organizationIDs) ? 1 : 0) + (has(self.projectIDs) ? 1 : 0) == 1")
        .message("spec.managerRoles[]: set exactly one of instance: true, organizationIDs and projectIDs"),
    validation = Rule::new("!has(self.grantedOrganizationIDs) || has(self.projectIDs)")
        .message("spec.managerRoles[].grantedOrganizationIDs: also set projectIDs, the projects that are granted to these organizations"),
    validation = Rule::new("self.roles.all(r, has(self.instance) ? r.startsWith('IAM_') : has(self.organizationIDs) ? r.startsWith('ORG_') : has(self.grantedOrganizationIDs) ? r.startsWith('PROJECT_GRANT_') : r.startsWith('PROJECT_') && !r.startsWith('PROJECT_GRANT_'))")
        .message(format!("spec.managerRoles[].roles: {ROLE_LEVEL}").as_str())
)]
pub struct AllowedRoles {
    /// Names of the roles.
    #[schemars(length(min = 1, max = 32), inner(length(max = 64), regex(pattern = ROLE_PATTERN)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub roles: Vec<String>,

    /// If true, the roles may be granted for the whole instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self").message("spec.managerRoles[].instance: set it to true, or leave it out"))]
    pub instance: Option<bool>,

    /// Organizations that the roles may be granted for.
    #[serde(default, rename = "organizationIDs", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 256), inner(length(max = 64), regex(pattern = ID_PATTERN)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub organization_ids: Vec<String>,

    /// Projects that the roles may be granted for. With grantedOrganizationIDs: the roles may be granted for the grants
    /// of these projects to those organizations.
    #[serde(default, rename = "projectIDs", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 256), inner(length(max = 64), regex(pattern = ID_PATTERN)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub project_ids: Vec<String>,

    /// Organizations that the projects are granted to.
    #[serde(default, rename = "grantedOrganizationIDs", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 256), inner(length(max = 64), regex(pattern = ID_PATTERN)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub granted_organization_ids: Vec<String>,

    /// Also allows privileged roles, with which their holder could take over the instance. These are `ORG_OWNER`,
    /// `ORG_USER_MANAGER`, `ORG_SETTINGS_MANAGER` and `ORG_` roles that end in `_IMPERSONATOR` in the organization of a
    /// user with roles of the instance, of the administrator, of ZITADEL's own project, or of a user who could take over one
    /// of these; and `PROJECT_OWNER` and `PROJECT_OWNER_GLOBAL` in that project. Default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_privileged: Option<bool>,
}

/// Service users that a policy allows the operator to create or take over.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Users {
    /// IDs of the organizations that the users may belong to.
    #[serde(default, rename = "organizationIDs", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(max = 64), regex(pattern = ID_PATTERN)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub organization_ids: Vec<String>,

    /// Usernames that are allowed besides the default `<cluster>-<namespace>-<name>`, such as `ci-*`. `*` stands for any
    /// characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 200), regex(pattern = USERNAME_PATTERN_PATTERN))]
    pub username_pattern: Option<String>,
}

/// Audiences that a policy allows.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct Audiences {
    /// IDs of ZITADEL projects. `["*"]` allows every project except the project of the ZITADEL API.
    #[serde(default, rename = "projectIDs", skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 256),
        inner(length(max = 64), regex(pattern = r"^([a-zA-Z0-9_-]+|\*)$"))
    )]
    #[x_kube(
        merge_strategy = ListMerge::Set,
        validation = Rule::new("!self.exists(p, p == 'zitadel')")
            .message("audiences.projectIDs: `zitadel` means the ZITADEL API; to allow it, set audiences.zitadelAPI: true")
    )]
    pub project_ids: Vec<String>,

    /// Whether tokens may have the audience of the ZITADEL API, named by its alias `zitadel` or by its project ID.
    #[serde(default, rename = "zitadelAPI", skip_serializing_if = "Option::is_none")]
    pub zitadel_api: Option<bool>,
}
