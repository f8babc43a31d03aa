package kube

import (
	"context"
	"errors"
	"fmt"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"

	"github.com/trivet-csi/trivet"
)

// Limits on calls to the API server. A few hundred nodes may ask for their first certificate at once.
const (
	apiTimeout  = 15 * time.Second
	apiQPS      = 50
	apiBurstMax = 100
)

// API is the Kubernetes API, as far as it is used here, seen from one namespace. Its errors are
// ErrNotFound, ErrExists, ErrPending for an object that changed since it was read, and ErrUnavailable
// for everything that may be different later, a missing permission included. It is safe for
// concurrent use.
type API struct {
	namespace    string
	core         rest.Interface
	auth         rest.Interface
	storage      rest.Interface
	coordination rest.Interface
}

// InCluster returns the API server that a pod is told of, with the pod's own token. Outside of a pod it
// returns ErrUnavailable.
func InCluster(namespace string) (*API, error) {
	cfg, err := rest.InClusterConfig()
	if err != nil {
		return nil, fmt.Errorf("find the API server (only pods can): %w: %w", err, trivet.ErrUnavailable)
	}
	return NewAPI(cfg, namespace)
}

// NewAPI returns the API server of a configuration. It connects at the first call.
func NewAPI(cfg *rest.Config, namespace string) (*API, error) {
	if namespace == "" {
		return nil, fmt.Errorf("use the API server: namespace is empty: %w", trivet.ErrInvalid)
	}
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"}) // the options of deletions
	if err := errors.Join(corev1.AddToScheme(scheme), authv1.AddToScheme(scheme), storagev1.AddToScheme(scheme),
		coordinationv1.AddToScheme(scheme)); err != nil {
		return nil, fmt.Errorf("use the API server: %w", err)
	}
	codecs := serializer.NewCodecFactory(scheme)
	client := func(path string, gv schema.GroupVersion) (rest.Interface, error) {
		c := rest.CopyConfig(cfg)
		c.APIPath, c.GroupVersion, c.NegotiatedSerializer = path, &gv, codecs.WithoutConversion()
		c.UserAgent, c.Timeout, c.QPS, c.Burst = "trivet", apiTimeout, apiQPS, apiBurstMax
		return rest.RESTClientFor(c)
	}
	core, errCore := client("/api", corev1.SchemeGroupVersion)
	auth, errAuth := client("/apis", authv1.SchemeGroupVersion)
	storage, errStorage := client("/apis", storagev1.SchemeGroupVersion)
	coordination, errCoordination := client("/apis", coordinationv1.SchemeGroupVersion)
	if err := errors.Join(errCore, errAuth, errStorage, errCoordination); err != nil {
		return nil, fmt.Errorf("use the API server: %w", err)
	}
	return &API{namespace: namespace, core: core, auth: auth, storage: storage, coordination: coordination}, nil
}

// Namespace returns the namespace whose objects are read and written.
func (a *API) Namespace() string { return a.namespace }

// Secret returns a Secret.
func (a *API) Secret(ctx context.Context, name string) (*corev1.Secret, error) {
	s := &corev1.Secret{}
	err := a.core.Get().Namespace(a.namespace).Resource("secrets").Name(name).Do(ctx).Into(s)
	return s, a.wrap("get Secret", name, err)
}

// CreateSecret makes a Secret that must not exist.
func (a *API) CreateSecret(ctx context.Context, s *corev1.Secret) error {
	err := a.core.Post().Namespace(a.namespace).Resource("secrets").Body(s).Do(ctx).Error()
	return a.wrap("create Secret", s.Name, err)
}

// ConfigMap returns a ConfigMap.
func (a *API) ConfigMap(ctx context.Context, name string) (*corev1.ConfigMap, error) {
	m := &corev1.ConfigMap{}
	err := a.core.Get().Namespace(a.namespace).Resource("configmaps").Name(name).Do(ctx).Into(m)
	return m, a.wrap("get ConfigMap", name, err)
}

// CreateConfigMap makes a ConfigMap that must not exist.
func (a *API) CreateConfigMap(ctx context.Context, m *corev1.ConfigMap) error {
	err := a.core.Post().Namespace(a.namespace).Resource("configmaps").Body(m).Do(ctx).Error()
	return a.wrap("create ConfigMap", m.Name, err)
}

// UpdateConfigMap replaces a ConfigMap, unless it changed since m was read: ErrPending. Afterwards m is
// what is stored, and may be updated again.
func (a *API) UpdateConfigMap(ctx context.Context, m *corev1.ConfigMap) error {
	stored := &corev1.ConfigMap{}
	err := a.core.Put().Namespace(a.namespace).Resource("configmaps").Name(m.Name).Body(m).Do(ctx).Into(stored)
	if err != nil {
		return a.wrap("update ConfigMap", m.Name, err)
	}
	*m = *stored
	return nil
}

// ReviewToken asks whose token it is. The answer says so itself when the token is nobody's; an error
// says that there is no answer.
func (a *API) ReviewToken(ctx context.Context, token, audience string) (*authv1.TokenReviewStatus, error) {
	review := &authv1.TokenReview{Spec: authv1.TokenReviewSpec{Token: token, Audiences: []string{audience}}}
	answer := &authv1.TokenReview{}
	err := a.auth.Post().Resource("tokenreviews").Body(review).Do(ctx).Into(answer)
	return &answer.Status, a.wrap("review", "token", err)
}

// wrap makes an error of the API about an object in the own namespace one of ours.
func (a *API) wrap(what, name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s in namespace %s: %w: %w", what, name, a.namespace, err, kindOf(err))
}

// wrapAny is wrap for an object anywhere.
func wrapAny(what, name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w: %w", what, name, err, kindOf(err))
}

// kindOf returns which of our errors an error of the API is.
func kindOf(err error) error {
	switch {
	case apierrors.IsNotFound(err):
		return trivet.ErrNotFound
	case apierrors.IsAlreadyExists(err):
		return trivet.ErrExists
	case apierrors.IsConflict(err):
		return trivet.ErrPending
	}
	return trivet.ErrUnavailable
}

// newObject returns the metadata of an object that an init Job makes.
func newObject(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: name, Labels: map[string]string{"app.kubernetes.io/name": "trivet"}}
}

// goneIsFine turns ErrNotFound, and ErrPending, by which a precondition says that it is another object by now,
// into success.
func goneIsFine(err error) error {
	if errors.Is(err, trivet.ErrNotFound) || errors.Is(err, trivet.ErrPending) {
		return nil
	}
	return err
}
